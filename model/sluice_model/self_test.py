"""Tests on the serving machine that a model gives the same bits however it is run."""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from sluice_model.model import Array, Model, example_inputs

_LENGTHS = np.array([64, 7, 3, 1, 33, 5, 7], np.int32)
_CUT = 4
# The proof that bits do not depend on the size of a run.
_SIZES = "bits.sizes"
# As large as the runs of a server may be, and odd. Operators that compute several values at a
# time, or in several threads, may round the remaining values, or those at the border between two
# threads, differently.
_ROWS_MAX = 1021
# The largest run takes about as long as a server lets one run take.
_MULTIPLICATIONS_MAX = 2**28


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test."""

    # Whether alone, batched, padded and chunked runs agreed bit for bit.
    is_bit_exact: bool
    # SHA-256, in hex, of known outputs: equal hashes, equal bits on two machines.
    arithmetic: str


def run_self_test(model: Model) -> SelfTest:
    """Run the same sequences ragged, alone, cut in two and in one large run; compare with `==`."""
    cells = model.affordable_cells(_MULTIPLICATIONS_MAX, at_least=_ROWS_MAX)
    lengths = np.minimum(_LENGTHS, max(1, cells // len(_LENGTHS)), dtype=np.int32)
    inputs = example_inputs(model.contract, len(lengths), int(lengths.max()))
    initial = np.tile(model.initial_state, (len(lengths), 1))
    batched, state = model.run(inputs, lengths, initial)
    digest = hashlib.sha256(state.tobytes())
    # Some operators differ too rarely for a sample. The export looked for them and noted it.
    is_bit_exact = all(proof.passed for proof in model.contract.proofs if proof.name == _SIZES)
    for row, length in enumerate(lengths):
        together = [array[row, :length] for array in batched]
        for array in together:
            digest.update(array.tobytes())
        alone = _run_cut(model, [array[row, :length] for array in inputs], cuts=[])
        cut = _run_cut(model, [array[row, :length] for array in inputs], cuts=[min(_CUT, length)])
        for rows, last in (alone, cut):
            is_bit_exact &= all(map(np.array_equal, rows, together)) and np.array_equal(
                last, state[row]
            )
    few, many = _run_few_and_many(model, inputs, cells)
    for one, other in zip(few, many, strict=True):
        is_bit_exact &= np.array_equal(one, other)
        digest.update(other.tobytes())
    return SelfTest(is_bit_exact=is_bit_exact, arithmetic=digest.hexdigest())


def _run_few_and_many(
    model: Model, inputs: list[Array], cells: int
) -> tuple[list[Array], list[Array]]:
    """Run a few rows, and then as many copies of them as `cells` allow.

    Returns outputs and last states of both runs, arranged so that each copy can be compared.
    """
    count, steps_max = inputs[0].shape[:2]
    rows_max = min(cells, model.contract.batch_max or _ROWS_MAX, _ROWS_MAX)
    steps = max(1, min(cells // rows_max, steps_max))
    copies = np.arange(rows_max) % count
    results: list[list[Array]] = []
    for rows in (np.arange(count), copies):
        state = np.tile(model.initial_state, (len(rows), 1))
        outputs, last = model.run([array[rows, :steps] for array in inputs], None, state)
        results.append([*outputs, last])
    few, many = results
    return [array[copies] for array in few], many


def _run_cut(model: Model, rows: list[Array], *, cuts: list[int]) -> tuple[list[Array], Array]:
    """One sequence alone, in pieces: (outputs [steps, …] each, last state [state_size])."""
    state = model.initial_state[np.newaxis]
    steps = len(rows[0])
    pieces: list[list[Array]] = []
    borders = [0, *(cut for cut in cuts if cut < steps), steps]
    for start, stop in itertools.pairwise(borders):
        lengths = np.array([stop - start], np.int32)
        piece = [array[np.newaxis, start:stop] for array in rows]
        outputs, state = model.run(piece, lengths, state)
        pieces.append([array[0] for array in outputs])
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)], state[0]
