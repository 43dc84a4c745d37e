"""Proves that a row depends neither on other rows nor on what is beyond its own length."""

import numpy as np

from sluice_export.proof.comparison import Array, count_differing
from sluice_export.proof.evidence import LENGTHS, STEPS, Evidence
from sluice_protos.contract_pb2 import Proof


def prove_rows_apart(evidence: Evidence) -> Proof:
    """A row does not change where all other rows and their states are NaN."""
    clean = evidence.run_ragged(evidence.inputs)
    differing = 0
    for row, length in enumerate(LENGTHS):
        others = np.arange(evidence.batch) != row
        inputs = [_spoil(array, others) for array in evidence.inputs]
        spoiled = evidence.run_ragged(inputs, _spoil(evidence.initial, others))
        differing += count_differing(spoiled.row(row, length), clean.row(row, length))
    return Proof(
        name="leak.rows",
        passed=differing == 0,
        figure=differing,
        detail="values of a row that change where all other rows are NaN",
    )


def prove_padding_ignored(evidence: Evidence) -> Proof:
    """A row does not change where NaN lies beyond its length."""
    clean = evidence.run_ragged(evidence.inputs)
    beyond = np.arange(STEPS) >= LENGTHS[:, np.newaxis]
    spoiled = evidence.run_ragged([_spoil(array, beyond) for array in evidence.inputs])
    differing = sum(
        count_differing(spoiled.row(row, length), clean.row(row, length))
        for row, length in enumerate(LENGTHS)
    )
    return Proof(
        name="leak.padding",
        passed=differing == 0,
        figure=differing,
        detail="values of a row that change where NaN lies beyond its length",
    )


def _spoil(array: Array, where: Array) -> Array:
    """`array` with NaN at the places `where`; integers and booleans with other valid values."""
    spoiled = array.copy()
    if array.dtype.kind == "f":
        spoiled[where] = np.nan
    else:
        spoiled[where] = np.roll(array, 1)[where]
    return spoiled
