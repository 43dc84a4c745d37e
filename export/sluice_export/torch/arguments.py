"""Flattens example inputs into named tensors, and constants that are fixed at export."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice_export.errors import InputError

# What a forward may raise on shapes, values or types that it does not accept.
FORWARD_ERRORS: Final = (
    RuntimeError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True)
class Argument:
    """A tensor among the flattened example arguments."""

    index: int
    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Arguments:
    """Example arguments, flattened."""

    structure: pytree.TreeSpec  # of (args, kwargs)
    constants: dict[int, Any]  # flattened arguments that are no tensors
    tensors: tuple[Argument, ...]

    def call(self, module: nn.Module, tensors: Mapping[int, Tensor]) -> Any:
        """What `module` returns with `tensors` instead of the examples, by their index."""
        leaves = {**self.constants, **tensors}
        args, kwargs = pytree.tree_unflatten(
            [leaves[i] for i in range(len(leaves))], self.structure
        )
        return module(*args, **kwargs)


def flatten_arguments(module: nn.Module, example_inputs: object) -> Arguments:
    """Flatten a tensor, a tuple of arguments or a dict of named ones, of tensors or numpy arrays.

    Floats get the precision of `module`. Raises InputError for tensors without a batch and a
    time axis.
    """
    args, kwargs = _as_call(example_inputs)
    paths, structure = pytree.tree_flatten_with_path((args, kwargs))
    names = _parameter_names(module, len(args))
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    constants: dict[int, Any] = {}
    tensors: list[Argument] = []
    for index, (path, leaf) in enumerate(paths):
        keys = [str(getattr(key, "idx", getattr(key, "key", key))) for key in path]
        first = names[int(keys[1])] if keys[0] == "0" else keys[1]
        name = "_".join([first, *keys[2:]])
        value = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        if isinstance(value, Tensor):
            _check_axes(name, value)
            value = value.detach().cpu()
            value = value.to(dtype) if value.is_floating_point() else value
            tensors.append(Argument(index, name, value))
        else:
            constants[index] = leaf
    if not tensors:
        raise InputError("example_inputs has no tensor; give one such as torch.zeros(1, 5, 8)")
    return Arguments(structure, constants, tuple(tensors))


def _as_call(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _parameter_names(module: nn.Module, count: int) -> list[str]:
    """What forward calls its first `count` arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(module, nn.RNNBase):
        named = ["x", "state"]
    return [*named, *(f"input_{place}" for place in range(len(named), count))]


def _check_axes(name: str, tensor: Tensor) -> None:
    if tensor.dim() < 2:
        raise InputError(
            f"input {name!r} has shape {list(tensor.shape)}: every input needs a batch and a time "
            "axis. Leave it out of the example inputs where forward has a default (the exported "
            "model takes the lengths of its rows by itself), give it as a plain number to fix it, "
            "or wrap the module in one whose forward sets it"
        )
