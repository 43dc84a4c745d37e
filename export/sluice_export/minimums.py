"""Measures the smallest batch and length from which a graph's bits no longer depend on either."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from sluice_model.model import Array, Model, example_inputs
from sluice_protos.contract_pb2 import Proof

_BATCHES: Final = (1, 2, 3, 4, 5, 8, 16, 33, 64)
_LENGTHS: Final = (1, 2, 3, 4, 7, 16)
# Beyond these, padding would cost more than the bits are worth.
_BATCH_MIN_MAX: Final = 8
_LENGTH_MIN_MAX: Final = 4
# Of the outputs of one run.
_VALUES_MAX: Final = 2**24


def measure_minimums(model: Model) -> tuple[int, int, Proof]:
    """(batch_min, length_min, proof): runs of every larger size give each row the same bits.

    Compares the rows of runs of many sizes with those of one large run. Where no
    small size does, both are 1 and the proof has not passed.
    """
    batches = _affordable_batches(model)
    differing = dict(_count_differing(model, batches))
    for length_min in filter(lambda length: length <= _LENGTH_MIN_MAX, _LENGTHS):
        for batch_min in filter(lambda batch: batch <= _BATCH_MIN_MAX, batches):
            if not any(
                count
                for (batch, length), count in differing.items()
                if batch >= batch_min and length >= length_min
            ):
                return batch_min, length_min, _proof(0, (batch_min, batches[-1]), length_min)
    return 1, 1, _proof(sum(differing.values()), (1, batches[-1]), 1)


def _affordable_batches(model: Model) -> list[int]:
    """The batches to try: fewer where the outputs of one run would fill the memory."""
    row = sum(math.prod(spec.shape) for spec in model.contract.outputs) * _LENGTHS[-1]
    largest = max(_BATCH_MIN_MAX * 2, _VALUES_MAX // row)
    return [batch for batch in _BATCHES if batch <= largest]


def _count_differing(model: Model, batches: Sequence[int]) -> Iterator[tuple[tuple[int, int], int]]:
    """For each (batch, length): how many values differ from those of the largest run."""
    inputs = example_inputs(model.contract, batches[-1], _LENGTHS[-1], seed=5)
    initial = np.tile(model.initial_state, (batches[-1], 1))

    def run(batch: int, length: int) -> tuple[list[Array], Array]:
        rows = [array[:batch, :length] for array in inputs]
        return model.run(rows, np.full(batch, length, np.int32), initial[:batch])

    outputs, _ = run(batches[-1], _LENGTHS[-1])
    for length in _LENGTHS:
        _, state = run(batches[-1], length)
        for batch in batches:
            small, after = run(batch, length)
            count = np.count_nonzero(after != state[:batch])
            for one, whole in zip(small, outputs, strict=True):
                count += np.count_nonzero(one != whole[:batch, :length])
            yield (batch, length), int(count)


def _proof(differing: int, batches: tuple[int, int], length_min: int) -> Proof:
    return Proof(
        name="bits.sizes",
        passed=differing == 0,
        figure=differing,
        detail=(
            "values that change by a bit between runs of "
            f"{batches[0]} to {batches[1]} rows and {length_min} to {_LENGTHS[-1]} steps"
        ),
    )
