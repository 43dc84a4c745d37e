"""Chunks that leave together, and how they are cut out of what callers gave."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sluice_client.protocol.calls import Call
from sluice_client.protocol.replay_buffer import KeptInputs
from sluice_client.protocol.signature import Array
from sluice_client.protocol.tables import Numbers, expand, groups


@dataclass(frozen=True, slots=True)
class Frame:
    """Chunks that leave together: lanes, first steps and counts [chunks], arrays [rows, …]."""

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
    kept: Mapping[int, KeptInputs],
) -> Frame:
    """The rows of one piece of each chunk, brought together call by call: all [chunks].

    The inputs of a call are with it, or kept, by its number.
    """
    order, runs = groups(chunks["call"])
    rows = chunks["row"][order] + (first - chunks["first"])[order]
    counts = counts[order]
    pieces: list[list[Array]] = []
    for number, start, stop in runs:
        arrays = (calls.get(number) or kept[number]).inputs
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
    """One frame of several, in their order; None of none."""
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
