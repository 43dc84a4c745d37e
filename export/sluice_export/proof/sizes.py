"""Measures from which batch and length on the bits of a graph no longer depend on either."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from sluice_export.proof.rounding import PACKET, find_uneven_operators
from sluice_model.contract import write_contract
from sluice_model.model import Array, Model, example_inputs
from sluice_protos.contract_pb2 import ModelContract, Proof

# Up to the largest runs that a server makes by default.
_BATCHES: Final = (1, 2, 3, 4, 5, 8, 16, 33, 64, 257, 1024)
_LENGTHS: Final = (1, 2, 3, 4, 7, 16, 33, 64)
# A graph that takes one step needs one run a step.
_LENGTHS_OF_ONE_STEP: Final = (1, 2, 3, 4, 7)
# Beyond these, padding would cost more than the bits are worth.
_BATCH_MIN_MAX: Final = 8
_LENGTH_MIN_MAX: Final = 4
# Larger runs repeat these rows.
_ROWS: Final = 32
# Multiply-adds of one run: an export takes seconds.
_MULTIPLICATIONS_MAX: Final = 2**31


def set_minimums(proto: onnx.ModelProto, contract: ModelContract) -> Proof:
    """Measure the smallest batch and length of `proto` and record both in `contract`."""
    contract.batch_min = contract.length_min = 1
    write_contract(proto, contract)
    model = Model(proto.SerializeToString(), contract)
    uneven = find_uneven_operators(proto)
    contract.batch_min, contract.length_min, sizes = measure_minimums(model, uneven)
    return sizes


def measure_minimums(model: Model, uneven: Sequence[str]) -> tuple[int, int, Proof]:
    """(batch_min, length_min, proof): runs of at least that size give each row the same bits.

    `model` must pad nothing: both are 1 in its contract. The rows of runs of many sizes are
    compared with the same rows of one run. Where the bits depend on every small size, both
    are 1 and the proof has not passed. It has not passed either where the graph has `uneven`
    operators, whose differences are too rare for any sample.
    """
    cells = model.affordable_cells(_MULTIPLICATIONS_MAX, at_least=_BATCHES[-1])
    batches = [
        batch for batch in _BATCHES if batch <= min(model.contract.batch_max or cells, cells)
    ]
    if any(cell.kind.startswith("RNN") for cell in model.contract.cells):
        # ONNX Runtime multiplies a single row of an RNN in another order: it is never exact,
        # even where a small sample agrees.
        batches = [batch for batch in batches if batch > 1] or batches
    lengths = _LENGTHS_OF_ONE_STEP if model.contract.is_one_step else _LENGTHS
    sizes = [(batch, length) for length in lengths for batch in batches if batch * length <= cells]
    differing = dict(_count_differing(model, sizes))
    smallest = [(b, n) for n in _lengths_to_pad(model.contract) for b in batches]
    for batch_min, length_min in smallest if not uneven else []:
        if batch_min <= _BATCH_MIN_MAX and not any(
            count
            for (batch, length), count in differing.items()
            if batch >= batch_min and length >= length_min
        ):
            return batch_min, length_min, _proof(0, _describe(sizes, batch_min, length_min))
    proof = _proof(sum(differing.values()), _describe(sizes, 1, 1))
    if uneven:
        proof.passed = False
        proof.detail += (
            f"; others will: {', '.join(uneven)} rounds the last values of a run in another way, "
            f"unless a step has {PACKET} of them or a multiple of {PACKET}"
        )
    return 1, 1, proof


def _lengths_to_pad(contract: ModelContract) -> list[int]:
    """The lengths that runs may be padded to; only 1 where a graph cannot tell padding."""
    is_padded = bool(contract.lengths_input) or not contract.state_size
    longest = _LENGTH_MIN_MAX if is_padded and not contract.is_one_step else 1
    return [length for length in _LENGTHS if length <= longest]


def _count_differing(
    model: Model, sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], int]]:
    """((batch, length), how many values differ from those of one run of the longest)."""
    longest = max(length for _, length in sizes)
    count = min(_ROWS, max(batch for batch, length in sizes if length == longest))
    inputs = example_inputs(model.contract, count, longest, seed=5)
    initial = np.tile(model.initial_state, (count, 1))

    def run(rows: NDArray[np.intp], length: int) -> tuple[list[Array], Array]:
        return model.run([array[rows, :length] for array in inputs], None, initial[rows])

    everything = np.arange(count)
    outputs, _ = run(everything, longest)
    states = {length: run(everything, length)[1] for length in {length for _, length in sizes}}
    for batch, length in sizes:
        different = 0
        for sample in range(_samples(batch, length)):
            rows = np.arange(sample * batch, (sample + 1) * batch) % count
            few, after = run(rows, length)
            different += int(np.count_nonzero(after != states[length][rows]))
            for one, whole in zip(few, outputs, strict=True):
                different += int(np.count_nonzero(one != whole[rows, :length]))
        yield (batch, length), different


def _samples(batch: int, length: int) -> int:
    """How many runs to compare: more of the small ones, which differ most often.

    A kernel for single rows may differ in one value of a hundred.
    """
    return 16 if batch * length <= 16 else 3 if batch * length <= _ROWS * 4 else 1


def _proof(differing: int, detail: str) -> Proof:
    return Proof(name="bits.sizes", passed=differing == 0, figure=differing, detail=detail)


def _describe(sizes: Sequence[tuple[int, int]], batch_min: int, length_min: int) -> str:
    batches, lengths = zip(*sizes, strict=True)
    cells = max(batch * length for batch, length in sizes)
    detail = (
        f"values that change by a bit between runs of {batch_min} to {max(batches)} rows and "
        f"{length_min} to {max(lengths)} steps"
    )
    if cells < max(batches) * max(lengths):
        detail += f", the largest of {cells:,} steps in all"
    return detail
