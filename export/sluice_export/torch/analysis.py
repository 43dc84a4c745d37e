"""Finds out, by calling it, how a module wants to be called and what its layers start from."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice_export.errors import (
    InputError,
    LayerError,
    NoRecurrentLayerError,
    UnsupportedModuleError,
    first_line,
)
from sluice_export.torch.argument_roles import REFUSALS, Roles, find_roles
from sluice_export.torch.arguments import Argument, Arguments, flatten_arguments
from sluice_export.torch.convolutions import CausalConvolution, find_convolutions
from sluice_export.torch.layer_calls import count_calls, find_initial
from sluice_export.torch.layers import RecurrentLayer, find_layers
from sluice_export.torch.outputs import LARGE, SMALL, CarriedState, find_outputs
from sluice_export.torch.recording import Observation, observe, watch
from sluice_export.torch.signature import RESERVED_NAMES, InputLeaf, Signature, StateLeaf


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
    unknown = valid.keys() - {argument.name for argument in arguments.tensors}
    if unknown:
        names = ", ".join(argument.name for argument in arguments.tensors)
        raise InputError(f"valid names {sorted(unknown)}, but the inputs are {names}")
    told = {a.index: valid[a.name] for a in arguments.tensors if a.name in valid}
    roles = find_roles(module, layers, arguments, told)
    signature, small = _find_layout(module, layers, arguments, roles)
    large = observe(signature, module, layers, signature.random_inputs(*LARGE, seed=2))
    _check_repeats(signature, module, small)
    counted = [count_calls(layer, small.calls(layer), large.calls(layer)) for layer in layers]
    layers = [layer for layer, _ in counted]
    calls = small.convolutions, large.convolutions
    convolutions = find_convolutions(module, calls, (SMALL, LARGE))
    if not layers and not convolutions:
        raise _nothing_to_carry(module)
    carried = [_carry(leaf, roles, layers, large, signature) for leaf in signature.states]
    ends = [end for layer in layers for end in large.ends(layer)]
    outputs = find_outputs(small, large, output_names, ends=ends, carried=carried)
    signature = replace(signature, outputs=outputs)
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


def _find_layout(
    module: nn.Module, layers: Sequence[RecurrentLayer], arguments: Arguments, roles: Roles
) -> tuple[Signature, Observation]:
    """The signature under which each layer sees the batch and the steps that the module is given.

    Also what was seen when the module was called so, with SMALL sizes.
    """
    failure: Exception | None = None
    misfit = ""
    for signature in _candidates(arguments, roles):
        try:
            seen = observe(signature, module, layers, signature.random_inputs(*SMALL, seed=1))
        except REFUSALS as error:
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


def _candidates(arguments: Arguments, roles: Roles) -> list[Signature]:
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


def _range(argument: Argument, roles: Roles) -> tuple[int, int] | None:
    """The valid values of an integer input; without a table, those between the example's."""
    tensor = argument.tensor
    if argument.index in roles.valid or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return roles.valid.get(argument.index)
    raise InputError(
        f"input {argument.name!r} has integers that do not all go, as they are, into nn.Embedding "
        f"tables of one size, so their range is unknown; name it: valid={{{argument.name!r}: "
        "(first, last)}, or make what goes into tables of other sizes an input of its own"
    )


def _carry(
    leaf: StateLeaf,
    roles: Roles,
    layers: Sequence[RecurrentLayer],
    seen: Observation,
    signature: Signature,
) -> CarriedState:
    """What becomes of a state argument in a call with LARGE sizes."""
    ends = tuple(reach.find_last(seen, layers) for reach in roles.states[leaf.index])
    name = next(a.name for a in signature.arguments.tensors if a.index == leaf.index)
    return CarriedState(name, leaf.zeros(LARGE[0]).shape, ends)


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
