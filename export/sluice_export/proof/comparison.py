"""Measures how far the results of two runs are apart."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Differences are relative to values of at least this size: smaller values are rounded like the
# values of order one that they come from.
_SCALE_MIN: Final = 0.01
# A feature that hardly moves is rounded at its size, not at its spread, so its spread counts as
# at least this share of its size.
_SPREAD_MIN: Final = 1 / 16
# A feature this much smaller than the largest is rounded at this share of the largest.
_SILENCE: Final = 1e-3


@dataclass(frozen=True)
class Result:
    """The results of a run: outputs [batch, steps, …] each, and the last state, packed."""

    outputs: list[Array]
    state: Array

    def row(self, row: int, length: int) -> "Result":
        """The valid part of one row: outputs [1, length, …] each, and the state [1, state_size]."""
        outputs = [array[row : row + 1, :length] for array in self.outputs]
        return Result(outputs, self.state[row : row + 1])

    @property
    def arrays(self) -> list[Array]:
        """The outputs and the state."""
        return [*self.outputs, self.state]


def measure_scale(expected: Array) -> Array:
    """The scale of each feature of an output [batch, steps, …]: differences are relative to it.

    It is the spread of the feature, but at least a sixteenth of its largest finite value, and
    at least a hundredth. So a small feature beside large ones, or one on top of a large
    constant, counts as much as the others.
    """
    if expected.dtype.kind != "f":
        return np.ones(expected.shape[2:])
    values, is_finite = expected.astype(np.float64), np.isfinite(expected)
    high = np.max(values, (0, 1), initial=-np.inf, where=is_finite)
    low = np.min(values, (0, 1), initial=np.inf, where=is_finite)
    largest = np.max(np.abs(values), (0, 1), initial=0, where=is_finite)
    scale: Array = np.maximum(np.clip(high - low, largest * _SPREAD_MIN, largest), _SCALE_MIN)
    return scale


def measure_difference(actual: Array, expected: Array, scale: Array | float | None = None) -> float:
    """The largest difference relative to `scale`; integers: how many values differ.

    Without a `scale` it is relative to the largest finite value expected, but to a hundredth at
    least. Equal infinities, and NaN in the same place, do not differ.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind not in "fc":
        return float(np.count_nonzero(actual != expected))
    with np.errstate(invalid="ignore"):
        distance = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    distance[(actual == expected) | (np.isnan(actual) & np.isnan(expected))] = 0
    if scale is None:
        largest = np.max(np.abs(expected), initial=0, where=np.isfinite(expected))
        scale = max(float(largest), _SCALE_MIN)
    return float(np.max(distance / scale, initial=0))


def count_ulps(actual: Array, expected: Array) -> float:
    """The largest difference in units in the last place of float32, among values not tiny.

    A value is tiny below a tenth of the largest: a rounding at the size of the large values is
    many units of a small one. 0 for integers.
    """
    if actual.shape != expected.shape or expected.dtype.kind != "f" or not expected.size:
        return 0.0
    sizes = np.abs(expected)
    largest = np.max(sizes, initial=0, where=np.isfinite(sizes))
    counts = np.isfinite(actual) & np.isfinite(expected) & (sizes >= largest / 10) & (sizes > 0)
    one, two = actual[counts], expected[counts]
    units = np.spacing(np.abs(two).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(one.astype(np.float64) - two) / units, initial=0))


def count_differing(one: Result, two: Result) -> int:
    """How many values differ in any bit, except in the sign of zero and the payload of NaN."""
    return sum(int(np.count_nonzero(differs)) for differs in _differing(one, two))


def count_feature_ulps(one: Result, two: Result, whole: Result) -> float:
    """The largest difference in units in the last place of each feature's largest value in `whole`.

    Infinite where only one of the two is a number. 0 for integers.
    """
    arrays = zip(_differing(one, two), one.arrays, two.arrays, whole.arrays, strict=True)
    return max(_feature_ulps(*group) for group in arrays)


def _differing(one: Result, two: Result) -> Iterator[Array]:
    """For each array of two results, which of its values differ."""
    for a, b in zip(one.arrays, two.arrays, strict=True):
        yield (a != b) & ~(np.isnan(a) & np.isnan(b))


def _feature_ulps(differs: Array, one: Array, two: Array, whole: Array) -> float:
    if one.dtype.kind != "f" or not differs.any():
        return 0.0
    axes = (0, 1) if whole.ndim > 2 else None
    sizes = np.max(np.abs(whole), axes, initial=0, where=np.isfinite(whole))
    sizes = np.maximum(sizes, np.max(sizes) * _SILENCE)
    with np.errstate(invalid="ignore"):
        apart = np.abs(one.astype(np.float64) - two) / np.spacing(sizes.astype(np.float32))
    apart[np.isnan(apart)] = np.inf
    return float(np.max(apart, initial=0, where=differs))
