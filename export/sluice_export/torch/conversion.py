"""Makes a module a candidate: its graph, its contract, and the reference for its proofs."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from sluice_export.proof.explanation import explain_failure
from sluice_export.proof.proofs import Candidate, Progress
from sluice_export.torch.analysis import analyse
from sluice_export.torch.contract import describe
from sluice_export.torch.explanation import explain_step
from sluice_export.torch.preparation import prepare
from sluice_export.torch.reference import ModuleReference
from sluice_export.torch.tracing import trace, without_notes


def convert_module(
    module: nn.Module,
    example_inputs: object,
    name: str,
    *,
    valid: Mapping[str, tuple[int, int]],
    output_names: Sequence[str] | None,
    tell: Progress,
) -> Candidate:
    """The graph of `module`; options as of export(). Raises ExportError."""
    tell("looking at the module", 0.0)
    original = prepare(module)
    analysis = analyse(original, example_inputs, valid=valid, output_names=output_names)
    contract = describe(analysis, name)
    tell("making the graph", 0.1)
    proto = trace(original, analysis)
    explain = (
        partial(explain_step, original, analysis)
        if analysis.is_stepwise
        else partial(explain_failure, proto)
    )
    return Candidate(without_notes(proto), contract, ModuleReference(original, analysis), explain)
