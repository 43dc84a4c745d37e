"""Repeats the proofs of a file that was written earlier, on the machine that will serve it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sluice_export.delivery import TOLERANCE, Progress
from sluice_export.errors import InputError
from sluice_export.exporter import prepare
from sluice_export.proof.comparison import Expected, Source
from sluice_export.proof.proofs import PROOFS, Evidence
from sluice_export.proof.rounding import find_uneven
from sluice_export.proof.sizes import measure_minimums
from sluice_export.torch.analysis import take_survey
from sluice_export.torch.reference import Reference
from sluice_export.torch.signature import Signature
from sluice_model.contract import load_proto, part_size
from sluice_model.errors import ModelError
from sluice_model.model import Array, Model
from sluice_protos.contract_pb2 import ModelContract, Proof
from sluice_protos.datatypes import DATATYPES


class Alone:
    """A file as its own reference: each row alone, in one run."""

    name = "each row alone in one run"

    def __init__(self, model: Model) -> None:
        """Compare `model` with itself."""
        self._model = model

    def run(self, inputs: Sequence[Array]) -> Expected:
        """As Source.run."""
        initial = self._model.initial_state[np.newaxis]
        rows = [
            self._model.run([array[row : row + 1] for array in inputs], None, initial)
            for row in range(len(inputs[0]))
        ]
        outputs = [np.concatenate(arrays) for arrays in zip(*(r[0] for r in rows), strict=True)]
        state = np.concatenate([row[1] for row in rows])
        parts = self._model.contract.state
        return Expected(
            outputs, {p.name: state[:, p.offset : p.offset + part_size(p)] for p in parts}
        )


def verify(
    path: str | os.PathLike[str],
    module: nn.Module | None = None,
    example_inputs: object = None,
    *,
    valid: Mapping[str, tuple[int, int]] | None = None,
    tolerance: float | None = None,
    on_progress: Progress | None = None,
) -> list[Proof]:
    """Every proof of the file at `path`, made anew; none is left out where one fails.

    Compared with `module` on `example_inputs`, as export() takes them, or, where it
    is None, with the file itself. `tolerance` is, left out, that of the export. Raises
    InputError where the file cannot be read or is not of that module.
    """
    tell = on_progress or (lambda what, share: None)
    try:
        model = Model.load(Path(path))
    except ModelError as error:
        raise InputError(str(error)) from error
    source: Source = Alone(model)
    if module is not None:
        source = _reference(module, example_inputs, valid or {}, model.contract)
    if tolerance is None:
        tolerance = _tolerance_of(model.contract)
    proofs = []
    try:
        evidence = Evidence(model, source, tolerance=tolerance)
        for place, (what, prove) in enumerate(PROOFS.items()):
            tell(what, place / len(PROOFS))
            proofs.append(prove(evidence))
    except ModelError as error:
        raise InputError(
            f"{path}: does not run on inputs that its contract allows ({error}); export it again"
        ) from error
    proofs.append(_measure_again(Path(path), model.contract))
    tell("done", 1.0)
    return proofs


def _tolerance_of(contract: ModelContract) -> float:
    """What the export allowed as a difference to its module or file."""
    parities = [proof for proof in contract.proofs if proof.name.startswith("parity.")]
    return max((proof.tolerance for proof in parities), default=TOLERANCE)


def _measure_again(path: Path, contract: ModelContract) -> Proof:
    """Whether bits depend on no batch or length beyond those that the contract knows of."""
    bare = ModelContract()
    bare.CopyFrom(contract)
    bare.batch_min = bare.length_min = 1
    uneven = find_uneven(load_proto(path))
    batch_min, length_min, proof = measure_minimums(Model(path.read_bytes(), bare), uneven)
    if batch_min > contract.batch_min or length_min > contract.length_min:
        proof.passed = False
        proof.detail = (
            f"here bits are exact from batch {batch_min} and length {length_min} on, not from "
            f"{contract.batch_min} and {contract.length_min} as the contract says"
        )
    return proof


def _reference(
    module: nn.Module,
    example_inputs: object,
    valid: Mapping[str, tuple[int, int]],
    contract: ModelContract,
) -> Reference:
    original = prepare(module)
    told = {
        spec.name: (spec.valid.min, spec.valid.max)
        for spec in contract.inputs
        if spec.HasField("valid")
    }
    survey = take_survey(original, example_inputs, valid={**told, **valid}, output_names=None)
    found = [(leaf.name, list(leaf.shape)) for leaf in survey.signature.inputs]
    expected = [(spec.name, list(spec.shape)) for spec in contract.inputs]
    if found != expected:
        raise InputError(f"the module takes {found}, the file {expected}: not the same model")
    parts = [part for carrier in survey.carriers for part in carrier.parts]
    if parts != [part.name for part in contract.state]:
        raise InputError(
            f"the module's states are {parts}, the file's {[p.name for p in contract.state]}: "
            "not the same model"
        )
    _check_outputs(survey.signature.as_float(), contract)
    return Reference(original, survey)


def _check_outputs(signature: Signature, contract: ModelContract) -> None:
    """Raise InputError unless the module's outputs are the file's, whatever they are called."""
    found = [
        (DATATYPES[torch.empty(0, dtype=leaf.dtype).numpy().dtype], list(leaf.shape))
        for leaf in signature.outputs
    ]
    expected = [(spec.datatype, list(spec.shape)) for spec in contract.outputs]
    if found != expected:
        raise InputError(
            f"the module gives {found}, the file {expected}: not the same model; give the module "
            "that the file was exported from, or export this one again"
        )
