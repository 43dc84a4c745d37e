"""Holds what a load measured: counts and latencies, of one process or merged from several."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


@dataclass
class Tally:
    """Latencies in seconds, one entry for chunks that were sent and answered together.

    latencies   [entries] from the time a chunk was to be sent until all its outputs had come
    chunks      [entries] the number of these chunks
    steps       [entries] the steps of each of these chunks
    lateness    [sends] how late the generator itself was
    steps_done  outputs that arrived within the measured time
    unanswered  chunks without an answer when the load stopped waiting; their latencies are
                counted up to that time
    """

    latencies: Floats
    chunks: Floats
    steps: Floats
    lateness: Floats
    steps_done: int
    unanswered: int

    @classmethod
    def merge(cls, tallies: "Iterable[Tally]") -> "Tally":
        """Merge several tallies into one."""
        parts = list(tallies)
        return cls(
            np.concatenate([part.latencies for part in parts]),
            np.concatenate([part.chunks for part in parts]),
            np.concatenate([part.steps for part in parts]),
            np.concatenate([part.lateness for part in parts]),
            sum(part.steps_done for part in parts),
            sum(part.unanswered for part in parts),
        )

    def of_steps(self) -> dict[str, float]:
        """Latency in ms at each quantile, over steps; a step waits for its whole chunk."""
        return quantiles(self.latencies, self.chunks * self.steps)

    def of_chunks(self, steps: int | None = None) -> dict[str, float]:
        """Latency in ms at each quantile, over all chunks or those with that many steps."""
        chosen = np.ones(len(self.steps), bool) if steps is None else self.steps == steps
        return quantiles(self.latencies[chosen], self.chunks[chosen])

    def generator_late(self) -> float:
        """How many ms the generator was late, at the 99th percentile."""
        return quantiles(self.lateness, np.ones(len(self.lateness)))["p99"]


def quantiles(seconds: Floats, weights: Floats) -> dict[str, float]:
    """Milliseconds at each of QUANTILES; 0 without entries. Both arrays are [entries]."""
    if not len(seconds):
        return dict.fromkeys(QUANTILES, 0.0)
    order = np.argsort(seconds)
    reached = np.cumsum(weights[order])
    found = np.searchsorted(reached, np.array(list(QUANTILES.values())) * reached[-1])
    values = 1000 * seconds[order][np.minimum(found, len(order) - 1)]
    return dict(zip(QUANTILES, values.tolist(), strict=True))
