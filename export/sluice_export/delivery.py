"""Proves a graph and then writes it: nothing unproven becomes a file."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

import onnx

from sluice_export.errors import ExportNotice, ParityError, first_line
from sluice_export.proof.comparison import Source
from sluice_export.proof.proofs import PROOFS, Evidence, is_required
from sluice_export.proof.rounding import find_uneven
from sluice_export.proof.sizes import measure_minimums
from sluice_model.contract import write_contract
from sluice_model.model import Model
from sluice_protos.contract_pb2 import ModelContract, Proof

# Relative to the largest value of each output: float32 keeps about seven digits,
# a wrong gate or a lost bias leaves none.
TOLERANCE: Final = 1e-4

# Told what is going on, and which share of the export is done (0 to 1).
Progress = Callable[[str, float], None]
# Given what a proof failed on, tells what in the model is at fault.
Explain = Callable[[Evidence], str]


def deliver(
    proto: onnx.ModelProto,
    contract: ModelContract,
    source: Source,
    path: Path,
    *,
    explain: Explain,
    tolerance: float,
    tell: Progress,
) -> None:
    """Write `proto` with `contract`, completed by every proof against `source`, to `path`.

    `explain` tells why a proof failed: what in the model is at fault, in sentences.
    Raises ParityError, and writes nothing then.
    """
    tell("measuring the smallest batch and length", 0.3)
    sizes = set_minimums(proto, contract)
    data = proto.SerializeToString()
    evidence = Evidence(Model(data, contract), source, tolerance=tolerance)
    contract.proofs.extend([*prove(evidence, explain, tell), sizes])
    for proof in contract.proofs:
        if not proof.passed:
            notify(f"{proof.name} does not hold: {proof.figure:g} {proof.detail}")
    write_contract(proto, contract)
    _write(proto, path)
    tell("done", 1.0)


def set_minimums(proto: onnx.ModelProto, contract: ModelContract) -> Proof:
    """Measure the smallest batch and length, and note both in `contract`."""
    contract.batch_min = contract.length_min = 1
    write_contract(proto, contract)
    model = Model(proto.SerializeToString(), contract)
    contract.batch_min, contract.length_min, sizes = measure_minimums(model, find_uneven(proto))
    return sizes


def prove(evidence: Evidence, explain: Explain, tell: Progress) -> list[Proof]:
    """Every proof, in order. Raises ParityError for the first that fails and matters."""
    proofs = []
    for place, (what, prove_one) in enumerate(PROOFS.items()):
        tell(what, 0.4 + 0.6 * place / len(PROOFS))
        proof = prove_one(evidence)
        if not proof.passed and is_required(proof):
            raise ParityError(
                f"{proof.name} failed: {proof.figure:.3g}, at most {proof.tolerance:.3g} is "
                f"allowed ({proof.detail}). {_explain(explain, evidence)}"
            )
        proofs.append(proof)
    return proofs


def _explain(explain: Explain, evidence: Evidence) -> str:
    """Why a proof failed; that it did is told, whatever becomes of the search for the cause."""
    try:
        return explain(evidence)
    except Exception as error:
        return (
            f"What in the model is at fault was not found out ({first_line(error)}): look for what "
            "reads other steps, other rows or a state that no layer carries"
        )


def notify(message: str) -> None:
    """Tell the caller of an export something that is not wrong."""
    warnings.warn(message, ExportNotice, stacklevel=4)


def _write(proto: onnx.ModelProto, path: Path) -> None:
    """Put the file in its place whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(proto.SerializeToString())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
