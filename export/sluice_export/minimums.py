"""Measures the smallest batch and length from which a graph's bits no longer depend on either."""

from collections.abc import Iterator
from typing import Final

import numpy as np

from sluice_model.model import Model, example_inputs
from sluice_protos.contract_pb2 import Proof

_BATCHES: Final = (1, 2, 3, 4, 5, 8, 16, 33, 64)
_LENGTHS: Final = (1, 2, 3, 4, 7, 16)
# Beyond these, padding would cost more than the bits are worth.
_BATCH_MIN_MAX: Final = 8
_LENGTH_MIN_MAX: Final = 4


def measure_minimums(model: Model) -> tuple[int, int, Proof]:
    """(batch_min, length_min, proof): runs of every larger size give each row the same bits.

    Compares the rows of runs of many sizes with those of one large run. Where no
    small size does, both are 1 and the proof has not passed.
    """
    differing = dict(_count_differing(model))
    for length_min in _LENGTHS:
        for batch_min in _BATCHES:
            left = sum(
                count
                for (batch, length), count in differing.items()
                if batch >= batch_min and length >= length_min
            )
            if not left and batch_min <= _BATCH_MIN_MAX and length_min <= _LENGTH_MIN_MAX:
                return batch_min, length_min, _proof(0, batch_min, length_min)
    return 1, 1, _proof(sum(differing.values()), 1, 1)


def _count_differing(model: Model) -> Iterator[tuple[tuple[int, int], int]]:
    """For each (batch, length): how many values differ from those of the largest run."""
    steps = _LENGTHS[-1]
    inputs = example_inputs(model.contract, _BATCHES[-1], steps, seed=5)
    initial = np.tile(model.initial_state, (_BATCHES[-1], 1))
    states = {}
    for length in _LENGTHS:
        rows = [array[:, :length] for array in inputs]
        outputs, states[length] = model.run(rows, np.full(len(initial), length, np.int32), initial)
    for batch in _BATCHES:
        for length in _LENGTHS:
            rows = [array[:batch, :length] for array in inputs]
            small, state = model.run(rows, np.full(batch, length, np.int32), initial[:batch])
            count = np.count_nonzero(state != states[length][:batch])
            for one, whole in zip(small, outputs, strict=True):
                count += np.count_nonzero(one != whole[:batch, :length])
            yield (batch, length), int(count)


def _proof(differing: int, batch_min: int, length_min: int) -> Proof:
    return Proof(
        name="bits.sizes",
        passed=differing == 0,
        figure=differing,
        detail=(
            "values that change by a bit between runs of "
            f"{batch_min} to {_BATCHES[-1]} rows and {length_min} to {_LENGTHS[-1]} steps"
        ),
    )
