"""What runs give, and how far two of them are apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Differences are relative to values of at least this size.
_SCALE_MIN: Final = 0.01
# A feature that hardly moves is rounded at its size: relative to its spread alone, it would
# differ by its rounding.
_SPREAD_MIN: Final = 1 / 16
# Of all features, what a nearly silent one is rounded at.
_SILENCE: Final = 1e-3


@dataclass(frozen=True)
class Result:
    """What a run of a graph gave: outputs [batch, steps, …] each, and the last state, packed."""

    outputs: list[Array]
    state: Array


@dataclass(frozen=True)
class Expected:
    """What the source of a graph gives: outputs [batch, steps, …] each, and its last state."""

    outputs: list[Array]
    # [batch, size] each, by the name of the part; without what the source keeps to itself.
    states: Mapping[str, Array] = field(default_factory=dict)
    # The steps that the outputs are of; None: all.
    steps: Sequence[int] | None = None


class Source(Protocol):
    """What a graph was made from, as it was before: what every proof compares with."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def run(self, inputs: Sequence[Array]) -> Expected:
        """Whole sequences of one length from the initial state; `inputs` [batch, steps, …] each."""


def measure_scale(expected: Array) -> Array:
    """What differences of each feature of an output are relative to; `expected` [batch, steps, …].

    The spread of the feature, within its largest finite value and a sixteenth of that, or a
    hundredth: a feature beside much larger ones, or on top of a large constant, counts as much.
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
    """The largest difference, relative to `scale`, or to the largest finite value expected.

    To a hundredth at least: values far below one are rounded as the values of order one that
    they come from: relative to themselves, a layer that is nearly silent would differ by its
    rounding alone.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind not in "fc":
        return float(np.count_nonzero(actual != expected))
    with np.errstate(invalid="ignore"):
        distance = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    # Equal infinities and NaN in the same place are no difference.
    distance[(actual == expected) | (np.isnan(actual) & np.isnan(expected))] = 0
    if scale is None:
        largest = np.max(np.abs(expected), initial=0, where=np.isfinite(expected))
        scale = max(float(largest), _SCALE_MIN)
    return float(np.max(distance / scale, initial=0))


def count_ulps(actual: Array, expected: Array) -> float:
    """The largest difference in units in the last place of float32, of values that are not tiny.

    Tiny is less than a tenth of the largest: what rounds at the size of the large
    values is many units of the small ones. 0 for integers.
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
    """How many values are not the same, bit for bit but for the sign of zero and NaN's payload."""
    pairs = zip([*one.outputs, one.state], [*two.outputs, two.state], strict=True)
    return sum(int(np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b)))) for a, b in pairs)


def count_ulps_apart(one: Result, two: Result, whole: Result) -> float:
    """The largest difference in units in the last place of each feature's largest value in `whole`.

    Infinite where only one of the two is a number. 0 for integers.
    """
    return max(
        _ulps_apart(*arrays)
        for arrays in zip(
            [*one.outputs, one.state],
            [*two.outputs, two.state],
            [*whole.outputs, whole.state],
            strict=True,
        )
    )


def _ulps_apart(one: Array, two: Array, whole: Array) -> float:
    differs = (one != two) & ~(np.isnan(one) & np.isnan(two))
    if one.dtype.kind != "f" or not differs.any():
        return 0.0
    axes = (0, 1) if whole.ndim > 2 else None
    sizes = np.max(np.abs(whole), axes, initial=0, where=np.isfinite(whole))
    sizes = np.maximum(sizes, np.max(sizes) * _SILENCE)
    with np.errstate(invalid="ignore"):
        apart = np.abs(one.astype(np.float64) - two) / np.spacing(sizes.astype(np.float32))
    apart[np.isnan(apart)] = np.inf
    return float(np.max(apart, initial=0, where=differs))
