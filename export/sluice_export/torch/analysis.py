"""Finds out, by calling a module, what it takes and returns, and what its layers start from."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice_export.contract import LENGTHS, STATE, STATE_OUT
from sluice_export.errors import (
    InputError,
    LayerError,
    NoRecurrentLayerError,
    UnsupportedModuleError,
    first_line,
)
from sluice_export.torch.argument_roles import Roles, find_roles
from sluice_export.torch.arguments import FORWARD_ERRORS, Argument, Arguments, flatten_arguments
from sluice_export.torch.convolutions import CausalConvolution, StatefulLayer, find_convolutions
from sluice_export.torch.layer_calls import count_calls, find_initial_states
from sluice_export.torch.layers import RecurrentLayer, find_layers
from sluice_export.torch.outputs import CarriedState, find_outputs
from sluice_export.torch.recording import Recording, record_call
from sluice_export.torch.signature import LARGE, SMALL, InputLeaf, Signature, StateLeaf


@dataclass(frozen=True)
class Analysis:
    """What is known of a module before it is traced."""

    signature: Signature
    layers: tuple[RecurrentLayer, ...]
    convolutions: tuple[CausalConvolution, ...]
    # The state before the first step where it is not zero, by part name.
    initial: dict[str, Tensor]
    # Whether it must be traced one step at a time: it has a loop over time, a convolution, or
    # an output for the sequence so far.
    is_stepwise: bool

    @property
    def stateful_layers(self) -> tuple[StatefulLayer, ...]:
        """All layers that carry a state from step to step, in packed order."""
        return (*self.layers, *self.convolutions)

    @property
    def state_size(self) -> int:
        """The floats of one packed state row."""
        shapes = (shape for layer in self.stateful_layers for shape in layer.parts.values())
        return sum(map(math.prod, shapes))


def analyse(
    module: nn.Module,
    example_inputs: object,
    *,
    valid: Mapping[str, tuple[int, int]],
    output_names: Sequence[str] | None,
) -> Analysis:
    """Call `module`, which is in eval mode, a few times and record what happens.

    `example_inputs` is a tensor, a tuple of arguments, or a dict of named ones, in the module's
    own layout; `valid` has the known ranges of integer inputs. Raises InputError or
    UnsupportedModuleError.
    """
    layers = find_layers(module)
    if not layers and not any(isinstance(child, nn.Conv1d) for child in module.modules()):
        raise _nothing_to_carry(module)
    arguments = flatten_arguments(module, example_inputs)
    unknown = valid.keys() - {argument.name for argument in arguments.tensors}
    if unknown:
        names = ", ".join(argument.name for argument in arguments.tensors)
        raise InputError(f"valid names {sorted(unknown)}, but the inputs are {names}")
    known = {a.index: valid[a.name] for a in arguments.tensors if a.name in valid}
    roles = find_roles(module, layers, arguments, known)
    signature, small = _find_layout(module, layers, arguments, roles)
    inputs = signature.random_inputs(*LARGE, seed=2)
    large = record_call(signature.call, module, layers, inputs)
    _check_repeats(signature, module, small)
    counted = [count_calls(layer, small.calls(layer), large.calls(layer)) for layer in layers]
    layers = [layer for layer, _ in counted]
    calls = small.convolution_calls, large.convolution_calls
    convolutions = find_convolutions(module, calls, (SMALL, LARGE))
    if not layers and not convolutions:
        raise _nothing_to_carry(module)
    carried = [_find_last_state(leaf, roles, layers, large, signature) for leaf in signature.states]
    ends = [end for layer in layers for end in large.ends(layer)]
    outputs = find_outputs(small, large, output_names, ends=ends, carried=carried)
    signature = replace(signature, outputs=outputs)
    _check_names(signature)
    initial = find_initial_states(layers, small, large) | {
        conv.part: conv.initial for conv in convolutions if conv.initial.any()
    }
    is_stepwise = (
        any(is_looped for _, is_looped in counted)
        or bool(convolutions)
        or any(leaf.time_axis is None for leaf in signature.outputs)
    )
    return Analysis(signature, tuple(layers), tuple(convolutions), initial, is_stepwise)


def _nothing_to_carry(module: nn.Module) -> NoRecurrentLayerError:
    return NoRecurrentLayerError(
        f"{type(module).__name__} has no nn.LSTM, nn.GRU or nn.RNN, none of their cells and no "
        "convolution over time, so it has no state to carry; pass the nn.Module that holds the "
        "recurrent layers (not a scripted one)"
    )


def _find_layout(
    module: nn.Module, layers: Sequence[RecurrentLayer], arguments: Arguments, roles: Roles
) -> tuple[Signature, Recording]:
    """The signature with which each layer sees the batch and the steps that the module is given.

    Also the recording of a call with that signature and SMALL sizes.
    """
    failure: Exception | None = None
    misfit = ""
    for signature in _candidates(arguments, roles):
        try:
            inputs = signature.random_inputs(*SMALL, seed=1)
            recording = record_call(signature.call, module, layers, inputs)
        except FORWARD_ERRORS as error:
            failure = failure or error
            continue
        # A loop over time gives a layer one step after another.
        fitting = (SMALL, (SMALL[0], 1))
        misfits = [call for call in recording.layer_calls if call.sizes not in fitting]
        if not misfits:
            return signature, recording
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
    """The signatures that the module may have, the likeliest first."""
    inputs = tuple(
        InputLeaf(a.index, a.name, a.tensor.dtype, tuple(a.tensor.shape[2:]), _range(a, roles))
        for a in arguments.tensors
        if a.index not in roles.states
    )
    if not inputs:
        raise InputError("every example input is a state; give the sequence too")
    held = [argument for argument in arguments.tensors if argument.index in roles.states]
    # Most states are [layers, batch, hidden], so their batch axis is 1.
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
    """The valid values of an integer input; None for other types. Raises InputError if unknown."""
    tensor = argument.tensor
    if argument.index in roles.valid or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return roles.valid.get(argument.index)
    raise InputError(
        f"input {argument.name!r} has integers that do not all go, as they are, into nn.Embedding "
        f"tables of one size, so their range is unknown; name it: valid={{{argument.name!r}: "
        "(first, last)}, or make what goes into tables of other sizes an input of its own"
    )


def _find_last_state(
    leaf: StateLeaf,
    roles: Roles,
    layers: Sequence[RecurrentLayer],
    recording: Recording,
    signature: Signature,
) -> CarriedState:
    """The last value of a state argument in a call with LARGE sizes."""
    ends = tuple(slot.find_last(recording, layers) for slot in roles.states[leaf.index])
    name = next(a.name for a in signature.arguments.tensors if a.index == leaf.index)
    return CarriedState(name, leaf.zeros(LARGE[0]).shape, ends)


def _check_names(signature: Signature) -> None:
    """Raise InputError unless every tensor of the graph has a name of its own."""
    names = [leaf.name for leaf in signature.inputs] + [leaf.name for leaf in signature.outputs]
    for place, name in enumerate(names):
        is_reserved = name in {LENGTHS, STATE, STATE_OUT}
        if is_reserved or name in names[:place] or not name:
            taken = "is Sluice's own" if is_reserved else "is taken twice, or empty"
            raise InputError(
                f"the name {name!r} {taken}; rename the argument of forward, or name the outputs "
                "with output_names"
            )


def _check_repeats(signature: Signature, module: nn.Module, first: Recording) -> None:
    """Raise UnsupportedModuleError when a second call on the same inputs returns something else."""
    again = record_call(signature.call, module, (), signature.random_inputs(*SMALL, seed=1))
    pairs = zip(pytree.tree_leaves(first.result), pytree.tree_leaves(again.result), strict=True)
    for before, after in pairs:
        if isinstance(before, Tensor) and not torch.allclose(
            before.double(), after.double(), rtol=1e-4, atol=1e-6, equal_nan=True
        ):
            raise UnsupportedModuleError(
                "two calls of the module on the same input differ: it keeps a state in an "
                "attribute or draws random numbers. Leave the state to the layers (call them "
                "without one), or take it as an argument of forward and return it"
            )
