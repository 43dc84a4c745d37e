"""The original module, run on arrays: what every proof compares with."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sluice_export.proof.comparison import Expected
from sluice_export.torch.analysis import Survey
from sluice_export.torch.recording import observe

Array = NDArray[Any]

# Of longer sequences, what is one value for the sequence so far is compared at some steps only.
_STEPS_MAX: Final = 64


class Reference:
    """The module as its author wrote it, in eval mode."""

    name = "the PyTorch module"

    def __init__(self, module: nn.Module, survey: Survey) -> None:
        """`survey` is of `module`."""
        self._module = module
        self._survey = survey

    def run(self, inputs: Sequence[Array]) -> Expected:
        """As Source.run. An output without time axis is, at a step, that of the sequence so far."""
        signature = self._survey.signature
        tensors = [
            torch.from_numpy(array).to(leaf.dtype)
            for array, leaf in zip(inputs, signature.inputs, strict=True)
        ]
        seen = observe(signature, self._module, self._survey.layers, tensors)
        states = {
            part: state.flatten(1).float().numpy()
            for part, state in seen.last_states(self._survey.carriers).items()
        }
        outputs = signature.take_outputs(seen.result, tensors)
        if all(leaf.time_axis is not None for leaf in signature.outputs):
            return Expected([tensor.numpy() for tensor in outputs], states)
        steps = list(_chosen_steps(tensors[0].shape[1]))
        so_far = [self._outputs_after(tensors, step + 1) for step in steps]
        gathered = [
            tensor[:, steps] if leaf.time_axis is not None else torch.cat(pieces, dim=1)
            for leaf, tensor, *pieces in zip(signature.outputs, outputs, *so_far, strict=True)
        ]
        return Expected([tensor.numpy() for tensor in gathered], states, steps)

    def _outputs_after(self, tensors: Sequence[Tensor], steps: int) -> list[Tensor]:
        """The outputs of the first `steps` steps."""
        signature = self._survey.signature
        begun = [tensor[:, :steps] for tensor in tensors]
        seen = observe(signature, self._module, (), begun)
        return signature.take_outputs(seen.result, begun)


def _chosen_steps(steps: int) -> Iterator[int]:
    """All steps of a short sequence; of a long one ever fewer, and the last."""
    step = 0
    while step < steps - 1:
        yield step
        step = step + 1 if steps <= _STEPS_MAX else step * 10 + 9
    yield steps - 1
