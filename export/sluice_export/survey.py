"""Finds out, by calling it, how a module wants to be called and what its layers start from."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice_export.arguments import Argument, Arguments, flatten_arguments
from sluice_export.carrying import count_calls, find_initial
from sluice_export.convolutions import CausalConvolution, find_convolutions
from sluice_export.errors import (
    InputError,
    LayerError,
    NoRecurrentLayerError,
    UnsupportedModuleError,
)
from sluice_export.layers import RecurrentLayer, find_layers
from sluice_export.observation import Observation, observe, watch
from sluice_export.results import LARGE, SMALL, find_outputs
from sluice_export.signature import RESERVED_NAMES, InputLeaf, Signature, StateLeaf, draw

# What a forward may raise when it is given shapes or values that it does not take.
_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


@dataclass(frozen=True)
class Survey:
    """What is known of a module before it is exported."""

    signature: Signature
    layers: tuple[RecurrentLayer, ...]
    convolutions: tuple[CausalConvolution, ...]
    # The state before the first step where it is not zero, by part name.
    initial: dict[str, Tensor]
    # Whether it must be shown one step at a time: it has a loop over time, a convolution, or
    # an output for the sequence so far.
    is_folded: bool

    @property
    def carriers(self) -> tuple[RecurrentLayer | CausalConvolution, ...]:
        """All that carries a state from step to step, in packed order."""
        return (*self.layers, *self.convolutions)

    @property
    def state_size(self) -> int:
        """The floats of one packed state row."""
        shapes = (shape for carrier in self.carriers for shape in carrier.parts.values())
        return sum(map(math.prod, shapes))


@dataclass(frozen=True)
class _Roles:
    """What the tensors among the arguments are for, by their index."""

    states: set[int]
    valid: dict[int, tuple[int, int]]


def take_survey(
    module: nn.Module,
    example_inputs: object,
    *,
    valid: Mapping[str, tuple[int, int]],
    output_names: Sequence[str] | None,
) -> Survey:
    """Call `module`, which is in eval mode, a few times and watch it.

    `example_inputs` is a tensor, a tuple of arguments, or a dict of named ones,
    in the module's own layout; `valid` the known ranges of integer inputs.
    Raises InputError or UnsupportedModuleError.
    """
    layers = find_layers(module)
    if not layers and not any(isinstance(child, nn.Conv1d) for child in module.modules()):
        raise _nothing_to_carry(module)
    arguments = flatten_arguments(module, example_inputs)
    roles = _find_roles(module, layers, arguments)
    roles.valid.update({a.index: valid[a.name] for a in arguments.tensors if a.name in valid})
    unknown = valid.keys() - {argument.name for argument in arguments.tensors}
    if unknown:
        names = ", ".join(argument.name for argument in arguments.tensors)
        raise InputError(f"valid names {sorted(unknown)}, but the inputs are {names}")
    signature, small = _find_layout(module, layers, arguments, roles)
    large = observe(signature, module, layers, signature.random_inputs(*LARGE, seed=2))
    _check_repeats(signature, module, small)
    counted = [count_calls(layer, small.calls(layer), large.calls(layer)) for layer in layers]
    layers = [layer for layer, _ in counted]
    calls = small.convolutions, large.convolutions
    convolutions = find_convolutions(module, calls, (SMALL, LARGE))
    if not layers and not convolutions:
        raise _nothing_to_carry(module)
    signature = replace(signature, outputs=find_outputs(small, large, output_names))
    _check_names(signature)
    initial = find_initial(layers, small, large) | {
        conv.part: conv.initial for conv in convolutions if conv.initial.any()
    }
    is_folded = (
        any(is_looped for _, is_looped in counted)
        or bool(convolutions)
        or any(leaf.time_axis is None for leaf in signature.outputs)
    )
    return Survey(signature, tuple(layers), tuple(convolutions), initial, is_folded)


def _nothing_to_carry(module: nn.Module) -> NoRecurrentLayerError:
    return NoRecurrentLayerError(
        f"{type(module).__name__} has no nn.LSTM, nn.GRU or nn.RNN, none of their cells and no "
        "convolution over time, so it has no state to carry; pass the nn.Module that holds the "
        "recurrent layers (not a scripted one)"
    )


def _find_roles(
    module: nn.Module, layers: Sequence[RecurrentLayer], arguments: Arguments
) -> _Roles:
    """Which arguments reach a layer as its state, and which integers index a table.

    The module is called with the example's own shapes and integers, and random
    numbers in the place of the example's.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        argument.index: draw(argument.tensor.dtype, argument.tensor.shape, None, generator)
        if argument.tensor.is_floating_point()
        else argument.tensor
        for argument in arguments.tensors
    }
    try:
        with watch(module, layers) as seen:
            arguments.call(module, tensors)
    except _REFUSALS as error:
        raise InputError(
            f"the module's forward failed on the example inputs ({first_line(error)}); "
            "give inputs that it accepts, in its own layout"
        ) from error
    _check_calls(layers, seen)
    given = [tensor for call in seen.layers for tensor in call.before]
    states = {
        index
        for index, leaf in tensors.items()
        if leaf.is_floating_point() and any(torch.isin(tensor, leaf).all() for tensor in given)
    }
    valid: dict[int, tuple[int, int]] = {}
    for table, indices in seen.lookups:
        for index, leaf in tensors.items():
            if not leaf.is_floating_point() and _is_same(leaf, indices):
                _, high = valid.get(index, (0, table.num_embeddings - 1))
                valid[index] = (0, min(high, table.num_embeddings - 1))
    return _Roles(states, valid)


def _is_same(leaf: Tensor, indices: Tensor) -> bool:
    """Whether `indices` are those of `leaf`: in its memory, or the same numbers elsewhere."""
    if leaf.untyped_storage().data_ptr() == indices.untyped_storage().data_ptr():
        return True
    return leaf.numel() == indices.numel() and torch.equal(
        leaf.flatten().long().sort().values, indices.flatten().long().sort().values
    )


def _check_calls(layers: Sequence[RecurrentLayer], seen: Observation) -> None:
    """Raise LayerError unless each layer was called, on a batch of sequences."""
    for layer in layers:
        calls = seen.calls(layer)
        if not calls:
            raise LayerError(
                f"{layer.name} is never called by forward, so its state cannot be carried; "
                "remove it from the module before the export"
            )
        if not all(call.sizes for call in calls):
            raise LayerError(
                f"{layer.name} is given an input without a batch axis; give example inputs of "
                "[batch, steps, features] (or [steps, batch, features] where the layer has "
                "batch_first=False)"
            )


def _find_layout(
    module: nn.Module, layers: Sequence[RecurrentLayer], arguments: Arguments, roles: _Roles
) -> tuple[Signature, Observation]:
    """The signature under which each layer sees the batch and the steps that the module is given.

    Also what was seen when the module was called so, with SMALL sizes.
    """
    failure: Exception | None = None
    misfit = ""
    for signature in _candidates(arguments, roles):
        try:
            seen = observe(signature, module, layers, signature.random_inputs(*SMALL, seed=1))
        except _REFUSALS as error:
            failure = failure or error
            continue
        # A loop over time gives a layer one step after another.
        fitting = (SMALL, (SMALL[0], 1))
        misfits = [call for call in seen.layers if call.sizes not in fitting]
        if not misfits:
            return signature, seen
        batch, steps = misfits[0].sizes or (0, 0)
        name = misfits[0].path or "the layer"
        misfit = misfit or f"{name} sees {batch} sequences of {steps} steps"
    given = f"{SMALL[0]} sequences of {SMALL[1]} steps"
    if misfit:
        raise LayerError(
            f"{misfit} when the module is given {given}; each sequence must reach each layer "
            "as one row, and each step as one step"
        )
    raise InputError(
        f"forward failed on {given} ({first_line(failure)}); it must take any number of both. "
        "A state of fixed size, kept in an attribute, is best left out: layers called without a "
        "state start from zeros. Where integers have a range, name it: valid={'name': (0, 9)}"
    ) from failure


def _candidates(arguments: Arguments, roles: _Roles) -> list[Signature]:
    """The signatures that the arguments may have, the likeliest first."""
    inputs = tuple(
        InputLeaf(a.index, a.name, a.tensor.dtype, tuple(a.tensor.shape[2:]), _range(a, roles))
        for a in arguments.tensors
        if a.index not in roles.states
    )
    if not inputs:
        raise InputError("every example input is a state; give the sequence too")
    held = [argument for argument in arguments.tensors if argument.index in roles.states]
    # A state is mostly [layers, batch, hidden], so its batch axis mostly 1.
    choices = [
        [
            StateLeaf(a.index, tuple(a.tensor.shape), axis, a.tensor.dtype)
            for axis in sorted(range(a.tensor.dim()), key=lambda axis: (axis != 1, axis))
        ]
        for a in held
    ]
    return [
        Signature(arguments, inputs, states, is_batch_first)
        for is_batch_first in (True, False)
        for states in itertools.product(*choices)
    ]


def _range(argument: Argument, roles: _Roles) -> tuple[int, int] | None:
    """The valid values of an integer input; without a table, those between the example's."""
    tensor = argument.tensor
    if argument.index in roles.valid or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return roles.valid.get(argument.index)
    raise InputError(
        f"input {argument.name!r} has integers that go into no nn.Embedding directly, so their "
        f"range is unknown; name it: valid={{{argument.name!r}: (first, last)}}"
    )


def _check_names(signature: Signature) -> None:
    """Raise InputError unless every tensor of the graph has a name of its own."""
    names = [leaf.name for leaf in signature.inputs] + [leaf.name for leaf in signature.outputs]
    for place, name in enumerate(names):
        if name in RESERVED_NAMES or name in names[:place] or not name:
            taken = "is Sluice's own" if name in RESERVED_NAMES else "is taken twice, or empty"
            raise InputError(
                f"the name {name!r} {taken}; rename the argument of forward, or name the outputs "
                "with output_names"
            )


def _check_repeats(signature: Signature, module: nn.Module, first: Observation) -> None:
    """Raise UnsupportedModuleError when a second call on the same inputs gives something else."""
    with watch(module, ()):
        again = signature.call(module, signature.random_inputs(*SMALL, seed=1))
    pairs = zip(pytree.tree_leaves(first.result), pytree.tree_leaves(again), strict=True)
    for before, after in pairs:
        if isinstance(before, Tensor) and not torch.allclose(
            before.double(), after.double(), rtol=1e-4, atol=1e-6, equal_nan=True
        ):
            raise UnsupportedModuleError(
                "two calls of the module on the same input differ: it keeps a state in an "
                "attribute or draws random numbers. Leave the state to the layers (call them "
                "without one), or take it as an argument of forward and return it"
            )


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
