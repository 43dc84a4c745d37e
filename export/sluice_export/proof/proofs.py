"""Tests of a graph against what it was made from, and against leaks between rows."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from sluice_export.proof.comparison import (
    Array,
    Expected,
    Result,
    Source,
    count_differing,
    count_ulps,
    count_ulps_apart,
    measure_difference,
    measure_scale,
)
from sluice_model.contract import part_size
from sluice_model.model import Model, example_inputs
from sluice_protos.contract_pb2 import Proof

# Rows that end at the full length, within it and after one step; and where the
# chunked run is cut.
LENGTHS: Final = np.array([11, 6, 1, 8], np.int32)
_STEPS: Final = 11
_CUT: Final = 6
_DRIFT_STEPS: Final = 10_000
_DRIFT_CHUNKS: Final = (1, 7, 64, 256)
# Two orders of one sum are a few apart; what depends on other steps or rows, millions.
_ULPS_MAX: Final = 1000


class Evidence:
    """A graph, what it was made from, and what both give for the same sequences."""

    def __init__(self, model: Model, reference: Source, *, tolerance: float) -> None:
        """Run the reference; `tolerance` is relative to the largest values of each feature."""
        self.model = model
        self.reference = reference
        self.tolerance = tolerance
        self.batch = len(LENGTHS)
        self.inputs = example_inputs(model.contract, self.batch, _STEPS, seed=4)
        self.initial = np.tile(model.initial_state, (self.batch, 1))
        self.expected = reference.run(self.inputs)
        names = [spec.name for spec in model.contract.outputs]
        # Of each output, what differences of its features are relative to.
        self.scales = dict(zip(names, map(measure_scale, self.expected.outputs), strict=True))

    def pair(self, actual: Result, expected: Expected) -> list[tuple[str, Array, Array]]:
        """What two results hold, side by side: each state part, then each output, by name."""
        contract = self.model.contract
        pairs = []
        for part in contract.state:
            if part.name in expected.states:
                place = slice(part.offset, part.offset + part_size(part))
                pairs.append((part.name, actual.state[:, place], expected.states[part.name]))
        for spec, one, two in zip(contract.outputs, actual.outputs, expected.outputs, strict=True):
            pairs.append(
                (spec.name, one if expected.steps is None else one[:, expected.steps], two)
            )
        return pairs

    def scale(self, name: str, expected: Array) -> Array | None:
        """What differences of an output are relative to; None for a part of the state."""
        if name not in self.scales:
            return None
        return np.maximum(self.scales[name], measure_scale(expected))

    def run_chunks(self, chunk: int) -> Result:
        """The whole sequences in chunks of at most `chunk` steps, the state carried between."""
        pieces: list[list[Array]] = []
        state = self.initial
        for start in range(0, _STEPS, chunk):
            rows = [array[:, start : start + chunk] for array in self.inputs]
            lengths = np.full(self.batch, rows[0].shape[1], np.int32)
            outputs, state = self.model.run(rows, lengths, state)
            pieces.append(outputs)
        return Result([np.concatenate(p, axis=1) for p in zip(*pieces, strict=True)], state)

    def run_ragged(self, inputs: Sequence[Array]) -> Result:
        """All rows in one run, each of its own length."""
        return Result(*self.model.run(inputs, LENGTHS, self.initial))


def _prove_whole(evidence: Evidence) -> Proof:
    return _parity(
        evidence,
        "parity.whole",
        [evidence.pair(evidence.run_chunks(_STEPS), evidence.expected)],
        f"{evidence.batch} whole sequences of {_STEPS} steps, against {evidence.reference.name}",
    )


def _prove_stepwise(evidence: Evidence) -> Proof:
    return _parity(
        evidence,
        "parity.stepwise",
        [evidence.pair(evidence.run_chunks(1), evidence.expected)],
        f"step by step with carried state, against {evidence.reference.name} on the whole sequence",
    )


def _prove_chunked(evidence: Evidence) -> Proof:
    return _parity(
        evidence,
        "parity.chunked",
        [evidence.pair(evidence.run_chunks(_CUT), evidence.expected)],
        f"in chunks of {_CUT} and {_STEPS - _CUT} steps with carried state, "
        f"against {evidence.reference.name} on the whole sequence",
    )


def prove_ragged(evidence: Evidence) -> Proof:
    """Rows of many lengths in one run, against the source on each row alone."""
    ragged = evidence.run_ragged(evidence.inputs)
    pairs = []
    for row, length in enumerate(LENGTHS):
        alone = evidence.reference.run([a[row : row + 1, :length] for a in evidence.inputs])
        pairs.append(evidence.pair(_row(ragged, row, length), alone))
    return _parity(
        evidence,
        "parity.ragged",
        pairs,
        f"rows of {', '.join(map(str, LENGTHS))} steps in one run, "
        f"each against {evidence.reference.name} on that row alone",
    )


def _prove_rows_apart(evidence: Evidence) -> Proof:
    clean = evidence.run_ragged(evidence.inputs)
    differing = 0
    for row, length in enumerate(LENGTHS):
        others = np.arange(evidence.batch) != row
        inputs = [_spoil(array, others) for array in evidence.inputs]
        state = _spoil(evidence.initial, others)
        outputs, after = evidence.model.run(inputs, LENGTHS, state)
        mine = _row(Result(outputs, after), row, length)
        differing += count_differing(mine, _row(clean, row, length))
    return Proof(
        name="leak.rows",
        passed=differing == 0,
        figure=differing,
        detail="values of a row that change where all other rows are NaN",
    )


def _prove_padding_ignored(evidence: Evidence) -> Proof:
    clean = evidence.run_ragged(evidence.inputs)
    beyond = np.arange(_STEPS) >= LENGTHS[:, np.newaxis]
    spoiled = evidence.run_ragged([_spoil(array, beyond) for array in evidence.inputs])
    differing = sum(
        count_differing(_row(spoiled, row, length), _row(clean, row, length))
        for row, length in enumerate(LENGTHS)
    )
    return Proof(
        name="leak.padding",
        passed=differing == 0,
        figure=differing,
        detail="values of a row that change where NaN lies beyond its length",
    )


def _prove_state_carried(evidence: Evidence) -> Proof:
    whole = evidence.run_chunks(_STEPS)
    chunked = [evidence.run_chunks(chunk) for chunk in (1, 2, 5, _CUT)]
    differing = max(count_differing(result, whole) for result in chunked)
    return Proof(
        name="bits.chunks",
        passed=differing == 0,
        figure=differing,
        ulps=max(count_ulps_apart(result, whole, whole) for result in chunked),
        detail="values of whole sequences that change by a bit when they are run in chunks "
        f"of 1, 2, 5 or {_CUT} steps",
    )


def _prove_rows_alone(evidence: Evidence) -> Proof:
    whole = evidence.run_chunks(_STEPS)
    ragged = evidence.run_ragged(evidence.inputs)
    differing, ulps = 0, 0.0
    for row, length in enumerate(LENGTHS):
        outputs, state = evidence.model.run(
            [array[row : row + 1, :length] for array in evidence.inputs],
            LENGTHS[row : row + 1],
            evidence.initial[:1],
        )
        alone, mine = _row(Result(outputs, state), 0, length), _row(ragged, row, length)
        differing += count_differing(alone, mine)
        ulps = max(ulps, count_ulps_apart(alone, mine, whole))
    return Proof(
        name="bits.ragged",
        passed=differing == 0,
        figure=differing,
        ulps=ulps,
        detail="values of a row of a ragged batch that change by a bit when it runs alone",
    )


def _prove_no_drift(evidence: Evidence) -> Proof:
    model = evidence.model
    inputs = example_inputs(model.contract, 1, _DRIFT_STEPS, seed=6)
    expected = evidence.reference.run(inputs)
    state = evidence.initial[:1]
    pieces: list[list[Array]] = []
    at = 0
    for chunk in itertools.cycle(_DRIFT_CHUNKS):
        if at >= _DRIFT_STEPS:
            break
        outputs, state = model.run([array[:, at : at + chunk] for array in inputs], None, state)
        pieces.append(outputs)
        at += chunk
    streamed = Result([np.concatenate(p, axis=1) for p in zip(*pieces, strict=True)], state)
    return _parity(
        evidence,
        "drift.long",
        [evidence.pair(streamed, expected)],
        f"a sequence of {_DRIFT_STEPS:,} steps, streamed in chunks of "
        f"{', '.join(map(str, _DRIFT_CHUNKS))} steps in turn, against {evidence.reference.name} "
        "on the whole sequence",
    )


# What people see while each runs, in the order in which failures are best read.
PROOFS: Final[dict[str, Callable[[Evidence], Proof]]] = {
    "whole sequences": _prove_whole,
    "step by step": _prove_stepwise,
    "in chunks": _prove_chunked,
    "ragged batches": prove_ragged,
    "no leak from row to row": _prove_rows_apart,
    "no leak from the padding": _prove_padding_ignored,
    "the same bits in any chunks": _prove_state_carried,
    "the same bits in any company": _prove_rows_alone,
    "no drift in a long sequence": _prove_no_drift,
}


def is_required(proof: Proof) -> bool:
    """Whether a file may not be written when `proof` fails."""
    if proof.name.startswith("bits."):
        return proof.ulps > _ULPS_MAX
    # Where a model is chaotic, the last bits of PyTorch and ONNX Runtime grow apart.
    return not proof.name.startswith("drift.")


def _parity(
    evidence: Evidence, name: str, pairs: Sequence[Sequence[tuple[str, Array, Array]]], detail: str
) -> Proof:
    figures = [
        (measure_difference(one, two, evidence.scale(where, two)), one, two, where)
        for group in pairs
        for where, one, two in group
    ]
    # NaN counts as the largest of all.
    figure = max((item[0] for item in figures), key=_rank)
    failing = [item[1:] for item in figures if not item[0] <= evidence.tolerance]
    passed = not failing
    if failing:
        # Of equals the earliest is named: what follows from it differs too.
        worst = max(failing, key=lambda item: _rank(measure_difference(*item[:2])))
        detail = f"{detail}; largest in {worst[2]}"
    return Proof(
        name=name,
        passed=passed,
        figure=figure,
        ulps=max(count_ulps(one, two) for group in pairs for _, one, two in group),
        tolerance=evidence.tolerance,
        detail=detail,
    )


def _rank(figure: float) -> tuple[bool, float]:
    return math.isnan(figure), figure


def _row(result: Result, row: int, length: int) -> Result:
    """What counts of one row: outputs [1, length, …] each, and the state [1, state_size]."""
    outputs = [array[row : row + 1, :length] for array in result.outputs]
    return Result(outputs, result.state[row : row + 1])


def _spoil(array: Array, where: Array) -> Array:
    """`array` with NaN at the places `where`; integers and truths with others of their values."""
    spoiled = array.copy()
    if array.dtype.kind == "f":
        spoiled[where] = np.nan
    else:
        spoiled[where] = np.roll(array, 1)[where]
    return spoiled
