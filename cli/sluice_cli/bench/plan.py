"""Describes a load: how many sequences, which sizes of chunks, which rate, which processes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Sizes:
    """How many steps a chunk has: `steps` [kinds], each with its `weight` [kinds]."""

    steps: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        """Read `64`, or `1:90,64:10`: 90 chunks of 1 step for each 10 of 64. Raises ValueError."""
        steps, weights = [], []
        for part in text.split(","):
            size, _, weight = part.partition(":")
            try:
                steps.append(int(size))
                weights.append(float(weight or 1))
            except ValueError:
                steps.append(0)
            if steps[-1] < 1 or weights[-1] <= 0:
                raise ValueError(
                    f"{text!r} is no size of a chunk; give steps, such as 64, or steps with "
                    "weights, such as 1:90,64:10"
                )
        return cls(tuple(steps), tuple(weights))

    @property
    def is_fixed(self) -> bool:
        """True if every chunk has the same number of steps."""
        return len(self.steps) == 1

    @property
    def mean(self) -> float:
        """The average number of steps of a chunk."""
        return float(np.average(self.steps, weights=self.weights))

    def draw(self, generator: np.random.Generator, count: int) -> Integers:
        """The steps of the next `count` chunks: [count]."""
        if self.is_fixed:
            return np.full(count, self.steps[0])
        shares = np.array(self.weights) / sum(self.weights)
        return generator.choice(np.array(self.steps), count, p=shares)


@dataclass(frozen=True)
class Plan:
    """A load, known to all of its processes. Times are in seconds, the rate in steps a second."""

    model: str
    addresses: tuple[str, ...]
    sequences: int
    in_flight: int
    streams: int
    processes: int
    sizes: Sizes
    rate: float | None
    warmup: float
    duration: float
    # How many steps of outputs to record for the verification, over all sequences.
    kept_steps: int
    seed: int = 0

    def streams_of(self, process: int) -> list[int]:
        """The numbers of the streams that one process has."""
        return list(range(process, self.streams, self.processes))

    def share(self, total: int, stream: int) -> int:
        """One stream's share of a total that is divided among all streams."""
        return total // self.streams + (stream < total % self.streams)
