"""The original module, run on arrays: what every proof compares with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sluice_export.layers import RecurrentLayer
from sluice_export.observation import observe
from sluice_export.signature import Signature

Array = NDArray[Any]


class Reference:
    """The module as its author wrote it, in eval mode."""

    name = "the PyTorch module"

    def __init__(
        self, module: nn.Module, layers: Sequence[RecurrentLayer], signature: Signature
    ) -> None:
        """`layers` are those of `module`."""
        self._module = module
        self._layers = layers
        self._signature = signature

    def run(self, inputs: Sequence[Array]) -> tuple[list[Array], NDArray[np.float32]]:
        """Whole sequences of one length from the initial state.

        `inputs` [batch, steps, …] each. Returns outputs [batch, steps, …] and the
        packed last state [batch, state_size].
        """
        tensors = [
            torch.from_numpy(array).to(leaf.dtype)
            for array, leaf in zip(inputs, self._signature.inputs, strict=True)
        ]
        seen = observe(self._signature, self._module, self._layers, tensors)
        outputs = [tensor.numpy() for tensor in self._signature.take_outputs(seen.result, tensors)]
        states = {id(call.layer): call.after for call in seen.layers}
        rows = [
            states[id(layer)][place][depth].float().numpy()
            for layer in self._layers
            for depth in range(layer.module.num_layers)
            for place in range(len(layer.kind.states))
        ]
        batch = len(inputs[0])
        state = np.concatenate(rows, axis=1) if rows else np.empty((batch, 0), np.float32)
        return outputs, state
