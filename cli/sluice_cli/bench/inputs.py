"""Draws the inputs of every sequence from a seed, so that they can be computed again later."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice_client.load import Field, Signature
from sluice_protos.contract_pb2 import ModelContract

Array = NDArray[Any]
Integers = NDArray[np.int64]

_ROWS = 4096


class Inputs:
    """A pool of random rows; step t of a sequence takes row `offset + t`, modulo the pool."""

    def __init__(self, contract: ModelContract, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._pools = {field.name: _draw(generator, field) for field in Signature(contract).inputs}

    def offsets(self, generator: np.random.Generator, sequences: int) -> Integers:
        """Draw where in the pool each new sequence begins: [sequences]."""
        return generator.integers(0, _ROWS, sequences)

    def take(self, offsets: Integers, steps: int) -> list[Array]:
        """The next `steps` rows from each of `offsets` [n]: [n × steps, …] for each input."""
        index = offsets if steps == 1 else (offsets[:, np.newaxis] + np.arange(steps)).ravel()
        return [pool.take(index, axis=0, mode="wrap") for pool in self._pools.values()]

    def whole(self, offset: int, steps: int) -> dict[str, Array]:
        """The first `steps` steps of the sequence that begins at `offset`: [steps, …], by name."""
        return dict(zip(self._pools, self.take(np.array([offset]), steps), strict=True))


def _draw(generator: np.random.Generator, field: Field) -> Array:
    shape = (_ROWS, *field.shape)
    if field.dtype.kind == "f":
        return generator.standard_normal(shape).astype(field.dtype)
    low, high = field.valid or (0, 1)
    return generator.integers(low, high, shape, np.int64, endpoint=True).astype(field.dtype)
