"""Proves that a model computes what its reference computes, however sequences are cut."""

import itertools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from sluice_export.proof.comparison import Array, Result, count_ulps, measure_difference
from sluice_export.proof.evidence import CUT, LENGTHS, STEPS, Evidence
from sluice_model.model import example_inputs
from sluice_protos.contract_pb2 import Proof

_DRIFT_STEPS: Final = 10_000
_DRIFT_CHUNKS: Final = (1, 7, 64, 256)

# (name, actual, expected) of each state part and output.
_Pairs = Sequence[tuple[str, Array, Array]]


def prove_whole(evidence: Evidence) -> Proof:
    """Whole sequences, against the reference."""
    return _prove(
        evidence,
        "parity.whole",
        [evidence.pair(evidence.run_chunks(STEPS), evidence.expected)],
        f"{evidence.batch} whole sequences of {STEPS} steps, against {evidence.reference.name}",
    )


def prove_stepwise(evidence: Evidence) -> Proof:
    """One step at a time with carried state, against the reference on the whole sequence."""
    return _prove(
        evidence,
        "parity.stepwise",
        [evidence.pair(evidence.run_chunks(1), evidence.expected)],
        f"step by step with carried state, against {evidence.reference.name} on the whole sequence",
    )


def prove_chunked(evidence: Evidence) -> Proof:
    """Two chunks with carried state, against the reference on the whole sequence."""
    return _prove(
        evidence,
        "parity.chunked",
        [evidence.pair(evidence.run_chunks(CUT), evidence.expected)],
        f"in chunks of {CUT} and {STEPS - CUT} steps with carried state, "
        f"against {evidence.reference.name} on the whole sequence",
    )


def prove_ragged(evidence: Evidence) -> Proof:
    """Rows of many lengths in one run, against the reference on each row alone."""
    ragged = evidence.run_ragged(evidence.inputs)
    groups = []
    for row, length in enumerate(LENGTHS):
        alone = evidence.reference.run([a[row : row + 1, :length] for a in evidence.inputs])
        groups.append(evidence.pair(ragged.row(row, length), alone))
    return _prove(
        evidence,
        "parity.ragged",
        groups,
        f"rows of {', '.join(map(str, LENGTHS))} steps in one run, "
        f"each against {evidence.reference.name} on that row alone",
    )


def prove_no_drift(evidence: Evidence) -> Proof:
    """A long sequence in chunks, against the reference on the whole sequence."""
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
    return _prove(
        evidence,
        "drift.long",
        [evidence.pair(streamed, expected)],
        f"a sequence of {_DRIFT_STEPS:,} steps, streamed in chunks of "
        f"{', '.join(map(str, _DRIFT_CHUNKS))} steps in turn, against {evidence.reference.name} "
        "on the whole sequence",
    )


def _prove(evidence: Evidence, name: str, groups: Sequence[_Pairs], detail: str) -> Proof:
    """The proof that each pair of arrays differs by at most the tolerance."""
    pairs = [pair for group in groups for pair in group]
    figures = [
        measure_difference(one, two, evidence.scale(where, two)) for where, one, two in pairs
    ]
    failing = [
        pair
        for pair, figure in zip(pairs, figures, strict=True)
        if not figure <= evidence.tolerance
    ]
    if failing:
        # Of equal differences the earliest is named: what follows from it differs too.
        worst = max(failing, key=lambda pair: _rank(measure_difference(*pair[1:])))
        detail = f"{detail}; largest in {worst[0]}"
    return Proof(
        name=name,
        passed=not failing,
        figure=max(figures, key=_rank),
        ulps=max(count_ulps(one, two) for _, one, two in pairs),
        tolerance=evidence.tolerance,
        detail=detail,
    )


def _rank(figure: float) -> tuple[bool, float]:
    """Order figures by size; NaN counts as the largest of all."""
    return math.isnan(figure), figure
