"""Proves that a sequence gives the same bits in any chunks and beside any other rows."""

from sluice_export.proof.comparison import Result, count_differing, count_feature_ulps
from sluice_export.proof.evidence import CUT, LENGTHS, STEPS, Evidence
from sluice_protos.contract_pb2 import Proof


def prove_equal_in_chunks(evidence: Evidence) -> Proof:
    """Whole runs, against runs in chunks of several sizes."""
    whole = evidence.run_chunks(STEPS)
    chunked = [evidence.run_chunks(chunk) for chunk in (1, 2, 5, CUT)]
    differing = max(count_differing(result, whole) for result in chunked)
    return Proof(
        name="bits.chunks",
        passed=differing == 0,
        figure=differing,
        ulps=max(count_feature_ulps(result, whole, whole) for result in chunked),
        detail="values of whole sequences that change by a bit when they are run in chunks "
        f"of 1, 2, 5 or {CUT} steps",
    )


def prove_equal_alone(evidence: Evidence) -> Proof:
    """Rows of a ragged run, against the same rows alone."""
    whole = evidence.run_chunks(STEPS)
    ragged = evidence.run_ragged(evidence.inputs)
    differing, ulps = 0, 0.0
    for row, length in enumerate(LENGTHS):
        inputs = [array[row : row + 1, :length] for array in evidence.inputs]
        run = evidence.model.run(inputs, LENGTHS[row : row + 1], evidence.initial[:1])
        alone, together = Result(*run).row(0, length), ragged.row(row, length)
        differing += count_differing(alone, together)
        ulps = max(ulps, count_feature_ulps(alone, together, whole))
    return Proof(
        name="bits.ragged",
        passed=differing == 0,
        figure=differing,
        ulps=ulps,
        detail="values of a row of a ragged batch that change by a bit when it runs alone",
    )
