"""Frames: chunks that are sent together, cut out of the inputs of calls."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sluice_client.protocol.calls import Call
from sluice_client.protocol.replay_buffer import RetainedInputs
from sluice_client.protocol.signature import Array
from sluice_client.protocol.tables import Numbers, expand, groups


@dataclass(frozen=True, slots=True)
class Frame:
    """Chunks that are sent together: lanes, first steps, counts [chunks]; inputs [rows, …] each."""

    lanes: Numbers
    first_steps: Numbers
    counts: Numbers
    inputs: list[Array]


def gather(
    lanes: Numbers,
    chunks: NDArray[np.void],
    first: Numbers,
    counts: Numbers,
    calls: Mapping[int, Call],
    retained: Mapping[int, RetainedInputs],
) -> Frame:
    """A frame of one piece of each chunk, from step `first` on: all arguments [chunks].

    The inputs are those of the outstanding or the retained call, by its number.
    """
    order, runs = groups(chunks["call"])
    rows = chunks["row"][order] + (first - chunks["first"])[order]
    counts = counts[order]
    pieces: list[list[Array]] = []
    for number, start, stop in runs:
        arrays = (calls.get(number) or retained[number]).inputs
        if stop - start == 1:
            row = int(rows[start])
            pieces.append([array[row : row + int(counts[start])] for array in arrays])
        else:
            index = expand(rows[start:stop], counts[start:stop])
            pieces.append([array[index] for array in arrays])
    inputs = (
        pieces[0]
        if len(pieces) == 1
        else [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]
    )
    return Frame(lanes[order], first[order], counts, inputs)


def join(frames: list[Frame]) -> Frame | None:
    """One frame of all, in their order; None if there are none."""
    if len(frames) <= 1:
        return frames[0] if frames else None
    return Frame(
        np.concatenate([frame.lanes for frame in frames]),
        np.concatenate([frame.first_steps for frame in frames]),
        np.concatenate([frame.counts for frame in frames]),
        [
            np.concatenate(arrays)
            for arrays in zip(*(frame.inputs for frame in frames), strict=True)
        ],
    )
