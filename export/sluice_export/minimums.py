"""Measures the smallest batch and length from which a graph's bits no longer depend on either."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from sluice_model.model import Array, Model, example_inputs
from sluice_protos.contract_pb2 import ModelContract, Proof

_BATCHES: Final = (1, 2, 3, 4, 5, 8, 16, 33, 64)
_LENGTHS: Final = (1, 2, 3, 4, 7, 16)
# Beyond these, padding would cost more than the bits are worth.
_BATCH_MIN_MAX: Final = 8
_LENGTH_MIN_MAX: Final = 4
# Of the outputs of one run.
_VALUES_MAX: Final = 2**24


def measure_minimums(model: Model) -> tuple[int, int, Proof]:
    """(batch_min, length_min, proof): runs of every larger size give each row the same bits.

    `model` pads nothing: both are 1 in its contract. Compares the rows of runs of
    many sizes with those of one large run. Where no small size does, both are 1 and
    the proof has not passed.
    """
    batches = _affordable_batches(model)
    if any(cell.kind.startswith("RNN") for cell in model.contract.cells):
        # ONNX Runtime multiplies a lone row of an RNN in another order: never exact,
        # even where a small sample happens to agree.
        batches = [batch for batch in batches if batch > 1] or batches
    differing = dict(_count_differing(model, batches))
    for length_min in _lengths_to_pad(model.contract):
        for batch_min in filter(lambda batch: batch <= _BATCH_MIN_MAX, batches):
            if not any(
                count
                for (batch, length), count in differing.items()
                if batch >= batch_min and length >= length_min
            ):
                return batch_min, length_min, _proof(0, (batch_min, batches[-1]), length_min)
    return 1, 1, _proof(sum(differing.values()), (1, batches[-1]), 1)


def _lengths_to_pad(contract: ModelContract) -> list[int]:
    """The smallest lengths that runs may be padded to: 1 where a graph cannot tell padding."""
    is_padded = bool(contract.lengths_input) or not contract.state_size
    longest = _LENGTH_MIN_MAX if is_padded and not contract.is_one_step else 1
    return [length for length in _LENGTHS if length <= longest]


def _affordable_batches(model: Model) -> list[int]:
    """The batches to try: fewer where the outputs of one run would fill the memory."""
    row = sum(math.prod(spec.shape) for spec in model.contract.outputs) * _LENGTHS[-1]
    largest = max(_BATCH_MIN_MAX * 2, _VALUES_MAX // row)
    largest = min(largest, model.contract.batch_max or largest)
    return [batch for batch in _BATCHES if batch <= largest]


def _count_differing(model: Model, batches: Sequence[int]) -> Iterator[tuple[tuple[int, int], int]]:
    """For each (batch, length): how many values differ from those of the largest run."""
    inputs = example_inputs(model.contract, batches[-1], _LENGTHS[-1], seed=5)
    initial = np.tile(model.initial_state, (batches[-1], 1))

    def run(rows: slice, length: int) -> tuple[list[Array], Array]:
        state = initial[rows]
        lengths = np.full(len(state), length, np.int32)
        return model.run([array[rows, :length] for array in inputs], lengths, state)

    everything = slice(None)
    outputs, _ = run(everything, _LENGTHS[-1])
    for length in _LENGTHS:
        _, state = run(everything, length)
        for batch in batches:
            count = 0
            # A kernel of its own for one row may differ in one value of a hundred.
            for start in range(0, batches[-1] - batch + 1, batch)[: _samples(batch)]:
                rows = slice(start, start + batch)
                small, after = run(rows, length)
                count += int(np.count_nonzero(after != state[rows]))
                for one, whole in zip(small, outputs, strict=True):
                    count += int(np.count_nonzero(one != whole[rows, :length]))
            yield (batch, length), count


def _samples(batch: int) -> int:
    """How many runs of `batch` rows to compare: more of those likeliest to differ."""
    return 16 if batch <= 2 else 3


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
