"""Runs a module as its author wrote it: what every proof of it compares with."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from sluice_export.errors import InputError
from sluice_export.proof.comparison import Array
from sluice_export.proof.evidence import Expected
from sluice_export.torch.analysis import Analysis, analyse
from sluice_export.torch.contract import describe
from sluice_export.torch.preparation import prepare
from sluice_export.torch.recording import record_call
from sluice_protos.contract_pb2 import ModelContract

# In longer sequences, an output that is one value for the sequence so far is compared at some
# steps only.
_STEPS_MAX: Final = 64


class ModuleReference:
    """The module in eval mode."""

    name = "the PyTorch module"

    def __init__(self, module: nn.Module, analysis: Analysis) -> None:
        """`analysis` is of `module`."""
        self._module = module
        self._analysis = analysis

    def run(self, inputs: Sequence[Array]) -> Expected:
        """As Reference.run; an output without time axis is, at a step, of the sequence so far."""
        signature = self._analysis.signature
        tensors = signature.to_tensors(inputs)
        recording = record_call(signature.call, self._module, self._analysis.layers, tensors)
        last = recording.last_states(self._analysis.stateful_layers)
        states = {part: state.flatten(1).float().numpy() for part, state in last.items()}
        outputs = signature.take_outputs(recording.result, tensors)
        if all(leaf.time_axis is not None for leaf in signature.outputs):
            return Expected([tensor.numpy() for tensor in outputs], states)
        steps = list(_choose_steps(tensors[0].shape[1]))
        so_far = [self._outputs_after(tensors, step + 1) for step in steps]
        gathered = [
            tensor[:, steps] if leaf.time_axis is not None else torch.cat(pieces, dim=1)
            for leaf, tensor, *pieces in zip(signature.outputs, outputs, *so_far, strict=True)
        ]
        return Expected([tensor.numpy() for tensor in gathered], states, steps)

    def _outputs_after(self, tensors: Sequence[Tensor], steps: int) -> list[Tensor]:
        """The outputs of the first `steps` steps."""
        signature = self._analysis.signature
        begun = [tensor[:, :steps] for tensor in tensors]
        recording = record_call(signature.call, self._module, (), begun)
        return signature.take_outputs(recording.result, begun)


def make_reference(
    module: nn.Module,
    example_inputs: object,
    contract: ModelContract,
    valid: Mapping[str, tuple[int, int]],
) -> ModuleReference:
    """The reference for a file that was exported from `module` earlier.

    Raises InputError unless inputs, states and outputs are those of `contract`; the names of
    outputs may differ.
    """
    original = prepare(module)
    known = {
        spec.name: (spec.valid.min, spec.valid.max)
        for spec in contract.inputs
        if spec.HasField("valid")
    }
    analysis = analyse(original, example_inputs, valid={**known, **valid}, output_names=None)
    described = describe(analysis, contract.name)
    inputs, states, outputs = zip(_outline(described), _outline(contract), strict=True)
    if inputs[0] != inputs[1]:
        raise InputError(f"the module takes {inputs[0]}, the file {inputs[1]}: not the same model")
    if states[0] != states[1]:
        raise InputError(
            f"the module's states are {states[0]}, the file's {states[1]}: not the same model"
        )
    if outputs[0] != outputs[1]:
        raise InputError(
            f"the module returns {outputs[0]}, the file {outputs[1]}: not the same model; give the "
            "module that the file was exported from, or export this one again"
        )
    return ModuleReference(original, analysis)


def _outline(contract: ModelContract) -> tuple[list[object], list[object], list[object]]:
    """The inputs, states and outputs of a contract, as far as they must not differ."""
    return (
        [(spec.name, list(spec.shape)) for spec in contract.inputs],
        [part.name for part in contract.state],
        [(spec.datatype, list(spec.shape)) for spec in contract.outputs],
    )


def _choose_steps(steps: int) -> Iterator[int]:
    """All steps of a short sequence; of a long one fewer and fewer, and the last."""
    step = 0
    while step < steps - 1:
        yield step
        step = step + 1 if steps <= _STEPS_MAX else step * 10 + 9
    yield steps - 1
