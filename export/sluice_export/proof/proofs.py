"""Runs every proof of a model, in order, and judges which failures stop an export."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import onnx

from sluice_export.errors import ParityError, first_line, notify
from sluice_export.proof import bits, leaks, parity
from sluice_export.proof.evidence import Evidence, Reference
from sluice_export.proof.sizes import set_minimums
from sluice_model.contract import write_contract
from sluice_model.model import Model
from sluice_protos.contract_pb2 import ModelContract, Proof

# Called with what is being done and the share of the work done so far, 0 to 1.
Progress = Callable[[str, float], None]

# Two orders of adding one sum are a few units apart; what depends on other steps or rows,
# millions.
_ULPS_MAX: Final = 1000

# By what progress calls each; the earlier a failure, the easier it is to understand.
PROOFS: Final[dict[str, Callable[[Evidence], Proof]]] = {
    "whole sequences": parity.prove_whole,
    "step by step": parity.prove_stepwise,
    "in chunks": parity.prove_chunked,
    "ragged batches": parity.prove_ragged,
    "no leak from row to row": leaks.prove_rows_apart,
    "no leak from the padding": leaks.prove_padding_ignored,
    "the same bits in any chunks": bits.prove_equal_in_chunks,
    "the same bits alone and in a batch": bits.prove_equal_alone,
    "no drift in a long sequence": parity.prove_no_drift,
}


@dataclass(frozen=True)
class Candidate:
    """A graph that is not proven yet, with its contract and what it was made from."""

    proto: onnx.ModelProto
    contract: ModelContract
    reference: Reference
    # Says in sentences what in the model makes a proof fail.
    explain: Callable[[Evidence], str]


def prove(candidate: Candidate, *, tolerance: float, tell: Progress) -> None:
    """Complete the contract of `candidate` with every proof, and write it into the graph.

    Raises ParityError for the first proof that fails and is required.
    """
    proto, contract = candidate.proto, candidate.contract
    tell("measuring the smallest batch and length", 0.3)
    sizes = set_minimums(proto, contract)
    model = Model(proto.SerializeToString(), contract)
    evidence = Evidence(model, candidate.reference, tolerance=tolerance)
    for proof in make_proofs(evidence, lambda what, share: tell(what, 0.4 + 0.6 * share)):
        if not proof.passed and is_required(proof):
            raise ParityError(
                f"{proof.name} failed: {proof.figure:.3g}, at most {proof.tolerance:.3g} is "
                f"allowed ({proof.detail}). {_explain(candidate, evidence)}"
            )
        contract.proofs.append(proof)
    contract.proofs.append(sizes)
    for proof in contract.proofs:
        if not proof.passed:
            notify(f"{proof.name} does not hold: {proof.figure:g} {proof.detail}")
    write_contract(proto, contract)


def make_proofs(evidence: Evidence, tell: Progress) -> Iterator[Proof]:
    """Every proof of `evidence`, in order, whether it passes or not."""
    for place, (what, prove_one) in enumerate(PROOFS.items()):
        tell(what, place / len(PROOFS))
        yield prove_one(evidence)


def is_required(proof: Proof) -> bool:
    """Whether a file may not be written when `proof` fails."""
    if proof.name.startswith("bits."):
        return proof.ulps > _ULPS_MAX
    # In a chaotic model the last bits of PyTorch and ONNX Runtime grow apart.
    return not proof.name.startswith("drift.")


def _explain(candidate: Candidate, evidence: Evidence) -> str:
    """Why a proof failed; an error in the search for the cause must not hide the failure."""
    try:
        return candidate.explain(evidence)
    except Exception as error:
        return (
            f"The cause was not found out ({first_line(error)}): look for an operation that reads "
            "other steps, other rows or a state that no layer carries"
        )
