"""Describes what a module takes and returns, in the batch-first form in which it is served."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice_export.contract import require_range
from sluice_export.torch.arguments import Arguments

# Batch and steps of two calls. All their sizes and products differ, so that an axis that grows
# with one of them is recognised by its two sizes.
SMALL: Final = (3, 7)
LARGE: Final = (5, 11)

_INTEGERS: Final = frozenset(
    {
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    }
)


@dataclass(frozen=True)
class InputLeaf:
    """An argument with one row for each step of each sequence."""

    index: int  # among the flattened arguments
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one step
    valid: tuple[int, int] | None = None  # inclusive, for integers that index a table

    def __post_init__(self) -> None:
        """Raise InputError unless `valid` is a range of integers."""
        if self.valid is not None:
            limits = torch.iinfo(self.dtype) if self.dtype in _INTEGERS else None
            held = (limits.min, limits.max) if limits else None
            require_range(self.name, held, self.valid)


@dataclass(frozen=True)
class StateLeaf:
    """An argument that takes a state: the module is given zeros, and the server has the state."""

    index: int
    shape: tuple[int, ...]
    batch_axis: int
    dtype: torch.dtype

    def zeros(self, batch: int) -> Tensor:
        """The initial state of `batch` sequences, in the module's own shape."""
        shape = list(self.shape)
        shape[self.batch_axis] = batch
        return torch.zeros(shape, dtype=self.dtype)


@dataclass(frozen=True)
class OutputLeaf:
    """A result with one row for each step of each sequence.

    Where batch and time are merged into one axis, [batch × steps, …], both axes are that one.
    Without a time axis it is one value for the sequence so far.
    """

    index: int  # among the flattened parts of what the module returns
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one step
    batch_axis: int
    time_axis: int | None


@dataclass(frozen=True)
class Signature:
    """How to call a module with arrays [batch, steps, …], and which results are its outputs."""

    arguments: Arguments
    inputs: tuple[InputLeaf, ...]
    states: tuple[StateLeaf, ...]
    is_batch_first: bool
    outputs: tuple[OutputLeaf, ...] = ()

    def call(self, module: nn.Module, inputs: Sequence[Tensor]) -> Any:
        """What `module` returns from the initial state; `inputs` [batch, steps, …] each."""
        tensors = {
            leaf.index: tensor if self.is_batch_first else tensor.transpose(0, 1)
            for leaf, tensor in zip(self.inputs, inputs, strict=True)
        }
        tensors |= {state.index: state.zeros(inputs[0].shape[0]) for state in self.states}
        return self.arguments.call(module, tensors)

    def to_tensors(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Inputs as tensors of the module's types."""
        return [
            torch.from_numpy(array).to(leaf.dtype)
            for array, leaf in zip(arrays, self.inputs, strict=True)
        ]

    def take_outputs(self, result: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, each [batch, steps, …], within what call(`inputs`) returned.

        Those without a time axis are [batch, 1, …].
        """
        leaves = pytree.tree_leaves(result)
        batch, steps = inputs[0].shape[:2]
        sizes = (batch, steps) if self.is_batch_first else (steps, batch)
        outputs = []
        for leaf in self.outputs:
            tensor = leaves[leaf.index]
            if leaf.time_axis is None:
                outputs.append(tensor.movedim(leaf.batch_axis, 0).unsqueeze(1))
                continue
            axes = (leaf.batch_axis, leaf.time_axis)
            if leaf.batch_axis == leaf.time_axis:
                first = leaf.batch_axis
                tensor = tensor.unflatten(first, sizes)
                axes = (first, first + 1) if self.is_batch_first else (first + 1, first)
            outputs.append(torch.movedim(tensor, axes, (0, 1)))
        return outputs

    def as_float(self) -> "Signature":
        """The same with float32 instead of float64, as in the graph."""

        def narrow(dtype: torch.dtype) -> torch.dtype:
            return torch.float32 if dtype == torch.float64 else dtype

        return replace(
            self,
            inputs=tuple(replace(leaf, dtype=narrow(leaf.dtype)) for leaf in self.inputs),
            states=tuple(replace(leaf, dtype=narrow(leaf.dtype)) for leaf in self.states),
            outputs=tuple(replace(leaf, dtype=narrow(leaf.dtype)) for leaf in self.outputs),
        )

    def random_inputs(self, batch: int, steps: int, *, seed: int) -> list[Tensor]:
        """Valid inputs drawn from `seed`, one [batch, steps, …] for each."""
        generator = torch.Generator().manual_seed(seed)
        return [
            draw(leaf.dtype, (batch, steps, *leaf.shape), leaf.valid, generator)
            for leaf in self.inputs
        ]


def draw(
    dtype: torch.dtype,
    shape: Sequence[int],
    valid: tuple[int, int] | None,
    generator: torch.Generator,
) -> Tensor:
    """Random values for a tensor of `dtype`: normal, or integers within `valid`."""
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, generator=generator)
    low, high = valid or (0, 1)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
