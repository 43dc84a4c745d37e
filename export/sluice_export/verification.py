"""Repeats the proofs of a file that was written earlier, on the machine that will serve it."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sluice_export.errors import InputError
from sluice_export.proof.comparison import Array
from sluice_export.proof.evidence import TOLERANCE, Evidence, Expected, Reference
from sluice_export.proof.proofs import Progress, make_proofs
from sluice_export.proof.sizes import set_minimums
from sluice_model.contract import load_proto, part_size
from sluice_model.errors import ModelError
from sluice_model.model import Model
from sluice_protos.contract_pb2 import ModelContract, Proof

if TYPE_CHECKING:
    from torch import nn


class SelfReference:
    """A file as its own reference: each row alone, in one run."""

    name = "each row alone in one run"

    def __init__(self, model: Model) -> None:
        """Compare `model` with itself."""
        self._model = model

    def run(self, inputs: Sequence[Array]) -> Expected:
        """As Reference.run."""
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
    module: "nn.Module | None" = None,
    example_inputs: object = None,
    *,
    valid: Mapping[str, tuple[int, int]] | None = None,
    tolerance: float | None = None,
    on_progress: Progress | None = None,
) -> list[Proof]:
    """Every proof of the file at `path`, made again; a proof that fails stops no other.

    The file is compared with `module` on `example_inputs`, as export() takes them, or, without
    a module, with itself. `tolerance` is by default that of the export. Raises InputError where
    the file cannot be read or is not of that module.
    """
    tell = on_progress or (lambda what, share: None)
    path = Path(path)
    try:
        model = Model.load(path)
    except ModelError as error:
        raise InputError(str(error)) from error
    reference: Reference = SelfReference(model)
    if module is not None:
        # PyTorch is imported only where a module is given: it takes seconds.
        from sluice_export.torch.reference import make_reference

        reference = make_reference(module, example_inputs, model.contract, valid or {})
    if tolerance is None:
        tolerance = _tolerance_of(model.contract)
    try:
        evidence = Evidence(model, reference, tolerance=tolerance)
        proofs = list(make_proofs(evidence, tell))
    except ModelError as error:
        raise InputError(
            f"{path}: does not run on inputs that its contract allows ({error}); export it again"
        ) from error
    proofs.append(_measure_again(path, model.contract))
    tell("done", 1.0)
    return proofs


def _tolerance_of(contract: ModelContract) -> float:
    """The difference that the export allowed."""
    parities = [proof for proof in contract.proofs if proof.name.startswith("parity.")]
    return max((proof.tolerance for proof in parities), default=TOLERANCE)


def _measure_again(path: Path, contract: ModelContract) -> Proof:
    """Whether bits are exact from the batch and length on that the contract names."""
    measured = copy.deepcopy(contract)
    proof = set_minimums(load_proto(path), measured)
    if measured.batch_min > contract.batch_min or measured.length_min > contract.length_min:
        proof.passed = False
        proof.detail = (
            f"here bits are exact from batch {measured.batch_min} and length {measured.length_min} "
            f"on, not from {contract.batch_min} and {contract.length_min} as the contract says"
        )
    return proof
