"""Exports a module: survey, graph, proofs, and only then the file."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from sluice_export.delivery import TOLERANCE, Progress, deliver, notify
from sluice_export.errors import UnsupportedModuleError
from sluice_export.proof.explanation import explain_failure
from sluice_export.torch.analysis import Survey, take_survey
from sluice_export.torch.explanation import explain_step
from sluice_export.torch.reference import Reference
from sluice_export.torch.signature import LENGTHS, STATE, STATE_OUT
from sluice_export.torch.tracing import make_graph, without_traces
from sluice_protos.contract_pb2 import Cell, ModelContract, StatePart, TensorSpec, ValueRange
from sluice_protos.datatypes import DATATYPES


def export(
    module: nn.Module,
    example_inputs: object,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    output_names: Sequence[str] | None = None,
    valid: Mapping[str, tuple[int, int]] | None = None,
    tolerance: float = TOLERANCE,
    on_progress: Progress | None = None,
) -> ModelContract:
    """Write `module` to `path` as one ONNX file that Sluice serves, once it is proven equal.

    example_inputs  what forward takes: a tensor, a tuple of arguments or a dict of
                    named ones, [batch, steps, …] or [steps, batch, …] as the module
                    wants it; sizes of batch and time do not matter, nor do float
                    values. Arguments that are no tensors are fixed at export
    name            of the model, for people; the file's name where left out
    output_names    of the outputs, in order; "y" where left out
    valid           the first and last valid value of integer inputs, by name; found
                    out for those that all go, as they are, into nn.Embedding tables of one size
    tolerance       the largest difference to PyTorch, relative to the largest value

    The module is exported as it is in eval mode (dropout off) and left unchanged.
    Returns the contract that the file carries. Raises ExportError, and writes
    nothing then.
    """
    path = Path(path)
    tell = on_progress or (lambda what, share: None)
    tell("looking at the module", 0.0)
    original = prepare(module)
    survey = take_survey(original, example_inputs, valid=valid or {}, output_names=output_names)
    contract = _describe(survey, name or path.stem)
    tell("making the graph", 0.1)
    proto = make_graph(original, survey)
    bare = without_traces(proto)
    explain = (
        partial(explain_step, original, survey)
        if survey.is_folded
        else partial(explain_failure, proto)
    )
    reference = Reference(original, survey)
    deliver(bare, contract, reference, path, explain=explain, tolerance=tolerance, tell=tell)
    return contract


def prepare(module: nn.Module) -> nn.Module:
    """A copy of `module` on the CPU in eval mode, in float32 or, where it has any, float64."""
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if module.training and any(map(_differs_in_training, module.modules())):
        notify(
            "the module is in training mode; it is exported as in eval mode: dropout off, also "
            "between recurrent layers, and batch normalisation by its running statistics"
        )
    # What weight_norm and the like compute into an attribute keeps its way back to the weights,
    # and is not copied with it; forward computes it anew.
    computed = {
        id(value): value.detach().clone()
        for child in module.modules()
        for value in vars(child).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        original = copy.deepcopy(module, computed).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModuleError(
            f"the module cannot be copied ({error}); build it afresh, load its state_dict and "
            "export that"
        ) from error
    tensors = (*original.parameters(), *original.buffers())
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        notify("the module computes in float64; it is exported, and proven, in float32")
        return original.double()
    return original.float()


def _differs_in_training(module: nn.Module) -> bool:
    """Whether a module does something else in training than in eval mode."""
    dropout = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.RNNBase)
    if isinstance(module, dropout):
        return bool(getattr(module, "p", 0) or getattr(module, "dropout", 0))
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _describe(survey: Survey, name: str) -> ModelContract:
    """The contract of the graph to be made, without proofs."""
    contract = ModelContract(name=name, lengths_input=LENGTHS, batch_min=1, length_min=1)
    signature = survey.signature.as_float()
    for leaf in signature.inputs:
        valid = ValueRange(min=leaf.valid[0], max=leaf.valid[1]) if leaf.valid else None
        contract.inputs.append(_tensor_spec(leaf.name, leaf.dtype, leaf.shape, valid))
    for output in signature.outputs:
        contract.outputs.append(_tensor_spec(output.name, output.dtype, output.shape, None))
    contract.state_input, contract.state_output = STATE, STATE_OUT
    for layer in survey.layers:
        contract.cells.append(
            Cell(
                name=layer.name,
                kind=layer.kind.name,
                layers=layer.depth,
                input_size=layer.module.input_size,
                hidden_size=layer.module.hidden_size,
                gates=layer.kind.gates,
            )
        )
    for carrier in survey.carriers:
        for part, shape in carrier.parts.items():
            initial = survey.initial.get(part, torch.empty(0))
            contract.state.append(
                StatePart(
                    name=part,
                    offset=contract.state_size,
                    shape=shape,
                    initial=initial.flatten().float().tolist(),
                )
            )
            contract.state_size += math.prod(shape)
    for package in ("sluice-serving", "torch", "onnx", "onnxscript", "onnxruntime"):
        contract.made_with[package] = metadata.version(package)
    return contract


def _tensor_spec(
    name: str, dtype: torch.dtype, shape: Sequence[int], valid: ValueRange | None
) -> TensorSpec:
    datatype = DATATYPES[torch.empty(0, dtype=dtype).numpy().dtype]
    return TensorSpec(
        name=name, datatype=datatype, shape=shape, batch_axis=0, time_axis=1, valid=valid
    )
