"""Tests, on the machine that will serve, that a model gives the same bits however it is run."""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from sluice_model.model import Array, Model, example_inputs

_LENGTHS = np.array([7, 3, 1, 5, 7], np.int32)
_CUT = 4


@dataclass(frozen=True)
class SelfTest:
    """What a self-test found."""

    # Alone, batched, padded and chunked runs agreed bit for bit.
    is_bit_exact: bool
    # SHA-256, in hex, of known outputs: equal hashes, equal bits on two machines.
    arithmetic: str


def run_self_test(model: Model) -> SelfTest:
    """Run the same ragged sequences batched, alone and cut in two, and compare with `==`."""
    inputs = example_inputs(model.contract, len(_LENGTHS), int(_LENGTHS.max()))
    initial = np.tile(model.initial_state, (len(_LENGTHS), 1))
    batched, state = model.run(inputs, _LENGTHS, initial)
    digest = hashlib.sha256(state.tobytes())
    is_bit_exact = True
    for row, length in enumerate(_LENGTHS):
        together = [array[row, :length] for array in batched]
        for array in together:
            digest.update(array.tobytes())
        alone = _run_cut(model, [array[row, :length] for array in inputs], cuts=[])
        cut = _run_cut(model, [array[row, :length] for array in inputs], cuts=[min(_CUT, length)])
        for rows, last in (alone, cut):
            is_bit_exact &= all(map(np.array_equal, rows, together)) and np.array_equal(
                last, state[row]
            )
    return SelfTest(is_bit_exact=is_bit_exact, arithmetic=digest.hexdigest())


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
