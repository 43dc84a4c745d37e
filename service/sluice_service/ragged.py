"""Chunks of different lengths as flat rows, and as the padded batch a run wants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Integers = NDArray[np.int64]


@dataclass(slots=True)
class Frame:
    """The rows that came in one message: one [rows, …] for each model input."""

    arrays: list[Array]
    # Seconds on the host's clock.
    arrived: float
    # Chunks that have not been finished or dropped; at 0 the frame is forgotten.
    pending: int = 0


def pad(rows: Array, starts: Integers, lengths: Integers, steps: int) -> Array:
    """[batch, steps, …] of the chunks that begin at `starts` [batch] in `rows` [n, …].

    Behind a chunk's end its last row is repeated: whatever a model makes of it is
    dropped, but it stays a value the model accepts, such as a valid token.
    """
    if steps == 1:
        if len(starts) == len(rows) and starts[0] == 0 and (np.diff(starts) == 1).all():
            return rows[:, np.newaxis]
        return rows.take(starts, axis=0)[:, np.newaxis]
    index = starts[:, np.newaxis] + np.arange(steps)
    np.minimum(index, (starts + lengths - 1)[:, np.newaxis], out=index)
    return rows.take(index, axis=0)


def pad_frames(
    frames: Sequence[Frame], which: Integers, starts: Integers, lengths: Integers, steps: int
) -> list[Array]:
    """One [batch, steps, …] for each input, where chunk b lies in `frames[which[b]]`."""
    if len(frames) == 1:
        return [pad(rows, starts, lengths, steps) for rows in frames[0].arrays]
    padded: list[Array] = [
        np.empty((len(which), steps, *rows.shape[1:]), rows.dtype) for rows in frames[0].arrays
    ]
    order = np.argsort(which, kind="stable")
    borders = np.searchsorted(which[order], np.arange(len(frames) + 1))
    for index, frame in enumerate(frames):
        chosen = order[borders[index] : borders[index + 1]]
        for target, rows in zip(padded, frame.arrays, strict=True):
            target[chosen] = pad(rows, starts[chosen], lengths[chosen], steps)
    return padded


def unpad(padded: Array, lengths: Integers) -> Array:
    """The rows [sum(lengths), …] of a padded batch [batch, steps, …], chunk after chunk."""
    batch, steps = padded.shape[:2]
    if steps == 1:
        return padded[:, 0]
    if lengths.min() == steps:
        return padded.reshape(batch * steps, *padded.shape[2:])
    return padded[np.arange(steps) < lengths[:, np.newaxis]]


def choose_steps(lengths: Integers, *, useful_share: float = 0.9) -> int:
    """The most steps to run at once so that at most 1 − `useful_share` of them is padding.

    Chunks longer than that are cut; running the shortest length wastes nothing,
    so there always is an answer.
    """
    ordered = np.sort(lengths)
    if ordered[0] == ordered[-1]:
        return int(ordered[0])
    batch = len(ordered)
    longer = np.arange(batch - 1, -1, -1)
    useful = np.cumsum(ordered) + ordered * longer
    return int(ordered[np.flatnonzero(useful >= useful_share * batch * ordered)[-1]])
