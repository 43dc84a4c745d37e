"""Traces a module into an ONNX graph: dynamic batch and time, lengths, one packed state."""

import contextlib
import copy
import io
import logging
import math
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import onnx
import torch
from torch import Tensor, nn

from sluice_export.contract import LENGTHS, STATE, STATE_OUT
from sluice_export.errors import TraceError
from sluice_export.source_lines import is_user_file
from sluice_export.torch.analysis import Analysis
from sluice_export.torch.native_layers import StateExchange, replace_layers

OPSET: Final = 20

# The sizes differ, so that no axis is taken for another.
_BATCH: Final = 3
_STEPS: Final = 7


class PackedModule(nn.Module):
    """A module as a pure function: (inputs, lengths, state) to (outputs, state_out).

    Traced one step at a time, the module sees one step of each of batch × steps sequences, and
    only the stateful layers see whole sequences. So a loop over time runs once, and what the
    module computes from the last step it computes from every step.
    """

    def __init__(self, module: nn.Module, analysis: Analysis) -> None:
        """Replace the stateful layers of a copy; `module` itself stays as it is."""
        super().__init__()
        module = copy.deepcopy(module).float()
        layers = [layer.within(module) for layer in analysis.stateful_layers]
        self._signature = analysis.signature.as_float()
        self._is_stepwise = analysis.is_stepwise
        self._exchange = [StateExchange()]
        self._shapes = {part: shape for layer in layers for part, shape in layer.parts.items()}
        self.module = replace_layers(module, layers, self._exchange[0])

    def forward(
        self, inputs: tuple[Tensor, ...], lengths: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        """`inputs` [batch, steps, …] each, `lengths` [batch], `state` [batch, state_size]."""
        exchange = self._exchange[0]
        exchange.lengths = lengths
        parts = torch.split(state, list(map(math.prod, self._shapes.values())), dim=1)
        exchange.before = {
            name: part.reshape(-1, *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        given = inputs
        if self._is_stepwise:
            exchange.merged = (inputs[0].shape[0], inputs[0].shape[1])
            given = tuple(tensor.flatten(0, 1).unsqueeze(1) for tensor in inputs)
        result = self._signature.call(self.module, given)
        outputs = self._signature.take_outputs(result, given)
        if self._is_stepwise:
            outputs = [exchange.split_axes(tensor.squeeze(1)) for tensor in outputs]
        rows = [exchange.after[part].flatten(1) for part in self._shapes]
        return (*outputs, torch.cat(rows, dim=1))


def trace(module: nn.Module, analysis: Analysis) -> onnx.ModelProto:
    """The graph of `module`, with every input and output [batch, steps, …].

    Raises TraceError where PyTorch's exporter fails.
    """
    signature = analysis.signature.as_float()
    inputs = tuple(signature.random_inputs(_BATCH, _STEPS, seed=3))
    lengths = torch.tensor([_STEPS, _STEPS - 2, 1], dtype=torch.int32)
    batch = torch.export.Dim("batch")
    steps = torch.export.Dim("steps")
    dimensions = (tuple({0: batch, 1: steps} for _ in inputs), {0: batch}, {0: batch})
    input_names = [*(leaf.name for leaf in signature.inputs), LENGTHS, STATE]
    output_names = [*(leaf.name for leaf in signature.outputs), STATE_OUT]
    packed = PackedModule(module, analysis).eval()
    with _silence(), torch.no_grad():
        try:
            program = torch.onnx.export(
                packed,
                (inputs, lengths, torch.zeros(_BATCH, analysis.state_size)),
                dynamo=True,
                opset_version=OPSET,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dimensions,
                verbose=False,
            )
        except Exception as error:
            raise TraceError(_explain(error)) from error
    assert program is not None
    proto = program.model_proto
    _check_dimensions(proto, input_names, output_names)
    return proto


def without_notes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `proto` without the exporter's notes on the source: paths and stack traces."""
    bare = copy.deepcopy(proto)
    bare.doc_string = ""
    bare.graph.doc_string = ""
    del bare.graph.metadata_props[:]
    for node in bare.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*bare.graph.input, *bare.graph.output, *bare.graph.value_info):
        value.doc_string = ""
        del value.metadata_props[:]
    return bare


def _check_dimensions(
    proto: onnx.ModelProto, input_names: Sequence[str], output_names: Sequence[str]
) -> None:
    """Raise TraceError unless batch and time are dynamic wherever they occur."""
    one_axis = {LENGTHS, STATE, STATE_OUT}
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        found = [dim.dim_param for dim in dims[: 1 if value.name in one_axis else 2]]
        if not all(found):
            raise TraceError(
                f"PyTorch's exporter froze an axis of {value.name!r} to "
                f"{[dim.dim_param or dim.dim_value for dim in dims]}: forward makes something of "
                "a fixed size; take sizes from x.shape, without int()"
            )
    names = [value.name for value in proto.graph.input]
    assert names == list(input_names), names
    assert [value.name for value in proto.graph.output] == list(output_names)


def _explain(error: BaseException) -> str:
    """Where PyTorch's exporter failed, why, and the fix."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    frames = [
        frame
        for frame in traceback.extract_tb(reason.__traceback__)
        if is_user_file(frame.filename) and frame.line
    ]
    place = f" at {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    code = f" ({frames[-1].line})" if frames else ""
    return (
        f"PyTorch's exporter could not make a graph of the module{place}{code}: "
        f"{type(reason).__name__}: {' '.join(lines[:1])} "
        "-- forward must not branch on values, and must take sizes from x.shape"
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep PyTorch's exporter from printing, warning and logging while the block runs."""
    # All loggers at once: some are created only while the exporter runs.
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
