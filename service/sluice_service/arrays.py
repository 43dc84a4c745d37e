"""Converts chunks of different lengths between flat rows and the padded batch of a run."""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Integers = NDArray[np.int64]
# The rows for each input of a model, as any kind of sequence.
Buffers: TypeAlias = "Sequence[bytes | Array]"

# Most chunks have one step: views of these cost less than new arrays.
_CACHED = 65_536
# Up to this many values, one product is cheaper than two passes. Beyond, BLAS uses threads.
_SMALL = 8192
_ZEROS: Final = np.zeros(_SMALL, np.float32)
_ONES: Final = np.ones(_CACHED, np.int64)
_COUNT: Final = np.arange(_CACHED)
_ONES.flags.writeable = _COUNT.flags.writeable = False


def ones(count: int) -> Integers:
    """[1, 1, …], read-only."""
    return _ONES[:count] if count <= _CACHED else np.ones(count, np.int64)


def is_ones(lengths: Integers) -> bool:
    """True if these are a view of `ones`, so that no value needs to be read."""
    return lengths.base is _ONES


def numbers(count: int) -> Integers:
    """[0, 1, 2, …], read-only."""
    return _COUNT[:count] if count <= _CACHED else np.arange(count)


def is_distinct(values: Integers, scratch: Integers) -> bool:
    """True when none of `values` [n] occurs twice; `scratch` is longer than the largest of them."""
    order = numbers(len(values))
    scratch[values] = order
    return bool((scratch[values] == order).all())


def starts_of(lengths: Integers) -> Integers:
    """Where each chunk begins when chunks of these lengths lie one after another."""
    if is_ones(lengths):
        return numbers(len(lengths))
    return np.cumsum(lengths) - lengths


def is_finite(array: Array) -> bool:
    """True when no value is NaN or infinite."""
    if array.size <= _SMALL and array.dtype == np.float32:
        # 0 times NaN or infinity is NaN, 0 times all else is 0.
        return bool(np.vdot(array, _ZEROS[: array.size]) == 0)
    # NaN and infinity show in the extremes, which need no array of booleans.
    return bool(np.isfinite(array.max()) and np.isfinite(array.min()))


def is_whole(lengths: Integers, steps: int) -> bool:
    """True if every length is `steps`, the longest one."""
    return steps == 1 or int(lengths.min()) == steps


def pad(rows: Array, starts: Integers, lengths: Integers, steps: int) -> Array:
    """[batch, steps, …] of the chunks that begin at `starts` [batch] in `rows` [n, …].

    A chunk is padded with its last row, because that is a value that the model accepts,
    such as a valid token. The outputs of the padding are dropped.
    """
    if steps == 1:
        return rows.take(starts, axis=0)[:, np.newaxis]
    index = starts[:, np.newaxis] + numbers(steps)
    np.minimum(index, (starts + lengths - 1)[:, np.newaxis], out=index)
    return rows.take(index, axis=0)


def pad_frames(
    frames: Sequence[Sequence[Array]],
    which: Integers,
    starts: Integers,
    lengths: Integers,
    steps: int,
) -> list[Array]:
    """One [batch, steps, …] for each input, where chunk b lies in `frames[which[b]]`.

    A frame is one [rows, …] for each input.
    """
    if len(frames) == 1:
        return [pad(rows, starts, lengths, steps) for rows in frames[0]]
    padded: list[Array] = [
        np.empty((len(which), steps, *rows.shape[1:]), rows.dtype) for rows in frames[0]
    ]
    order = np.argsort(which, kind="stable")
    borders = np.searchsorted(which[order], np.arange(len(frames) + 1))
    for index, frame in enumerate(frames):
        chosen = order[borders[index] : borders[index + 1]]
        for target, rows in zip(padded, frame, strict=True):
            target[chosen] = pad(rows, starts[chosen], lengths[chosen], steps)
    return padded


def unpad(padded: Array, lengths: Integers, *, is_whole: bool) -> Array:
    """The rows [sum(lengths), …] of a padded batch [batch, steps, …], chunk after chunk.

    `is_whole` if every chunk is as long as the batch.
    """
    batch, steps = padded.shape[:2]
    if is_whole:
        return padded.reshape(batch * steps, *padded.shape[2:])
    return padded[numbers(steps) < lengths[:, np.newaxis]]


def choose_steps(lengths: Integers, *, useful_share: float = 0.9) -> int:
    """The most steps to run at once so that at most 1 − `useful_share` of them is padding.

    Longer chunks are cut. Running only the shortest length needs no padding, so there is
    always an answer.
    """
    ordered = np.sort(lengths)
    if ordered[0] == ordered[-1]:
        return int(ordered[0])
    batch = len(ordered)
    longer = np.arange(batch - 1, -1, -1)
    useful = np.cumsum(ordered) + ordered * longer
    return int(ordered[np.flatnonzero(useful >= useful_share * batch * ordered)[-1]])
