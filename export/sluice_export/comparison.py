"""What runs give, and how far two of them are apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Differences are relative to values of at least this size.
_SCALE_MIN: Final = 0.01


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


def measure_difference(actual: Array, expected: Array) -> float:
    """The largest difference, relative to the largest finite value expected, or to a hundredth.

    Values far below one are rounded as the values of order one that they come from: relative
    to themselves, a layer that is nearly silent would differ by its rounding alone.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind not in "fc":
        return float(np.count_nonzero(actual != expected))
    with np.errstate(invalid="ignore"):
        distance = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    # Equal infinities and NaN in the same place are no difference.
    distance[(actual == expected) | (np.isnan(actual) & np.isnan(expected))] = 0
    largest = np.max(np.abs(expected), initial=0, where=np.isfinite(expected))
    return float(np.max(distance, initial=0) / max(largest, _SCALE_MIN))


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
