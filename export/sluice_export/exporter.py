"""Exports a module: survey, graph, proofs, and only then the file."""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sluice_export.errors import ExportNotice, NoRecurrentLayerError, ParityError
from sluice_export.graph import LENGTHS, STATE, STATE_OUT, make_graph, without_traces
from sluice_export.layers import RecurrentLayer, find_layers
from sluice_export.minimums import measure_minimums
from sluice_export.proofs import PROOFS, Evidence, is_required
from sluice_export.reference import Reference
from sluice_export.survey import Survey, take_survey
from sluice_model import Model, write_contract
from sluice_protos.contract_pb2 import Cell, ModelContract, Proof, StatePart, TensorSpec, ValueRange
from sluice_protos.datatypes import DATATYPES

# Relative to the largest value of each output: float32 keeps about seven digits,
# a wrong gate or a lost bias leaves none.
TOLERANCE: Final = 1e-4

# Told what is going on, and which share of the export is done (0 to 1).
Progress = Callable[[str, float], None]


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
                    out for those that go into an nn.Embedding
    tolerance       the largest difference to PyTorch, relative to the largest value

    The module is exported as it is in eval mode (dropout off) and left unchanged.
    Returns the contract that the file carries. Raises ExportError, and writes
    nothing then.
    """
    path = Path(path)
    tell = on_progress or (lambda what, share: None)
    tell("looking at the module", 0.0)
    original = _prepare(module)
    layers = find_layers(original)
    if not layers:
        raise NoRecurrentLayerError(
            f"{type(module).__name__} has no nn.LSTM, nn.GRU or nn.RNN, so it has no state to "
            "carry; pass the nn.Module that holds the recurrent layers (not a scripted one)"
        )
    survey = take_survey(
        original,
        layers,
        _to_dtype_of(original, example_inputs),
        valid=valid or {},
        output_names=output_names,
    )
    contract = _describe(survey, layers, name or path.stem)
    tell("making the graph", 0.1)
    proto = make_graph(original, survey.signature.as_float(), state_size=contract.state_size)
    bare = without_traces(proto)
    write_contract(bare, contract)
    model = Model(bare.SerializeToString(), contract)
    reference = Reference(original, layers, survey.signature)
    contract.proofs.extend(_prove(model, reference, tolerance, tell))
    write_contract(bare, contract)
    _write(bare, path)
    tell("done", 1.0)
    return contract


def _prepare(module: nn.Module) -> nn.Module:
    """A copy of `module` on the CPU in eval mode, in float32 or, where it has any, float64."""
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    original = copy.deepcopy(module).cpu().eval()
    dtypes = {tensor.dtype for tensor in (*original.parameters(), *original.buffers())}
    if torch.float64 in dtypes:
        warnings.warn(
            "the module computes in float64; it is exported in float32, and proven within the "
            "tolerance of that",
            ExportNotice,
            stacklevel=3,
        )
        return original.double()
    return original.float()


def _to_dtype_of(module: nn.Module, example_inputs: object) -> object:
    """The example inputs, their floats in the module's own precision."""
    dtype = next((p.dtype for p in module.parameters()), torch.float32)

    def convert(leaf: object) -> object:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    return pytree.tree_map(convert, example_inputs)


def _describe(survey: Survey, layers: Sequence[RecurrentLayer], name: str) -> ModelContract:
    """The contract of the graph to be made, without proofs."""
    contract = ModelContract(name=name, lengths_input=LENGTHS, batch_min=1, length_min=1)
    signature = survey.signature.as_float()
    for leaf in signature.inputs:
        valid = ValueRange(min=leaf.valid[0], max=leaf.valid[1]) if leaf.valid else None
        contract.inputs.append(_tensor_spec(leaf.name, leaf.dtype, leaf.shape, valid))
    for output in signature.outputs:
        contract.outputs.append(_tensor_spec(output.name, output.dtype, output.shape, None))
    contract.state_input, contract.state_output = STATE, STATE_OUT
    for layer in layers:
        hidden = layer.module.hidden_size
        contract.cells.append(
            Cell(
                name=layer.name,
                kind=layer.kind.name,
                layers=layer.module.num_layers,
                input_size=layer.module.input_size,
                hidden_size=hidden,
                gates=layer.kind.gates,
            )
        )
        for part in layer.parts:
            initial = survey.initial.get(part)
            contract.state.append(
                StatePart(
                    name=part,
                    offset=contract.state_size,
                    shape=[hidden],
                    initial=[] if initial is None else initial.float().tolist(),
                )
            )
            contract.state_size += hidden
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


def _prove(model: Model, reference: Reference, tolerance: float, tell: Progress) -> Sequence[Proof]:
    """Every proof of `model`, which has its smallest batch and length afterwards.

    Raises ParityError for the first that fails and matters.
    """
    tell("measuring the smallest batch and length", 0.3)
    contract = model.contract
    contract.batch_min, contract.length_min, sizes = measure_minimums(model)
    evidence = Evidence(model, reference, tolerance=tolerance)
    proofs = []
    for place, prove in enumerate(PROOFS):
        tell(prove.__name__.removeprefix("_").replace("_", " "), 0.4 + 0.6 * place / len(PROOFS))
        proof = prove(evidence)
        if not proof.passed and is_required(proof):
            raise ParityError(
                f"{proof.name} failed with {proof.figure:.3g} (at most {proof.tolerance:.3g}): "
                f"{proof.detail}"
            )
        proofs.append(proof)
    return [*proofs, sizes]


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
