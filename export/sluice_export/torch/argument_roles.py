"""Finds out, with random numbers, which arguments of a module are states or index a table."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluice_export.errors import InputError, LayerError, first_line
from sluice_export.torch.arguments import FORWARD_ERRORS, Arguments
from sluice_export.torch.integer_ranges import find_ranges
from sluice_export.torch.layers import RecurrentLayer
from sluice_export.torch.recording import Recording, record_call
from sluice_export.torch.signature import draw


@dataclass(frozen=True)
class StateSlot:
    """Where a state argument arrives: one state of one call of a layer."""

    layer: RecurrentLayer
    call: int
    place: int  # among the states of the layer's kind

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the {self.layer.kind.states[self.place]} of {self.layer.name}"

    def find_last(self, recording: Recording, layers: Sequence[RecurrentLayer]) -> Tensor:
        """The last state in that slot; `layers` are those that `recording` is of."""
        layer = next(layer for layer in layers if layer.path == self.layer.path)
        return recording.last_calls(layer)[self.call % layer.calls].after[self.place]


@dataclass(frozen=True)
class Roles:
    """What the tensors among the arguments are for, by their index."""

    states: dict[int, list[StateSlot]]
    # (first, last) of integers.
    valid: dict[int, tuple[int, int]]


def find_roles(
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    arguments: Arguments,
    valid: Mapping[int, tuple[int, int]],
) -> Roles:
    """Which arguments reach a layer as its state, and the ranges of those that index a table.

    The module is called with the shapes of the examples and random numbers. `valid` are the
    ranges that are known. Raises InputError or LayerError.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        argument.index: draw(argument.tensor.dtype, argument.tensor.shape, None, generator)
        if argument.tensor.is_floating_point()
        else argument.tensor
        for argument in arguments.tensors
    }
    try:
        recording = record_call(arguments.call, module, layers, tensors)
    except FORWARD_ERRORS as error:
        raise InputError(
            f"the module's forward failed on the example inputs ({first_line(error)}); "
            "give inputs that it accepts, in its own layout"
        ) from error
    _check_calls(layers, recording)
    states = {
        argument.index: slots
        for argument in arguments.tensors
        if argument.tensor.is_floating_point()
        and (slots := _find_slots(argument.name, tensors[argument.index], layers, recording))
    }
    ranges = find_ranges(module, arguments, tensors, recording)
    return Roles(states, {**ranges, **valid})


def _check_calls(layers: Sequence[RecurrentLayer], recording: Recording) -> None:
    """Raise LayerError unless each layer was called, on a batch of sequences."""
    for layer in layers:
        calls = recording.calls(layer)
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


def _find_slots(
    name: str, leaf: Tensor, layers: Sequence[RecurrentLayer], recording: Recording
) -> list[StateSlot]:
    """Where a tensor arrives as a state. Raises LayerError where one value of it does twice."""
    found: list[tuple[StateSlot, Tensor]] = []
    for layer in layers:
        for number, call in enumerate(recording.calls(layer)):
            found += [
                (StateSlot(layer, number, place), tensor)
                for place, tensor in enumerate(call.before)
                if torch.isin(tensor, leaf).all()
            ]
    for (one, first), (two, second) in itertools.combinations(found, 2):
        if torch.isin(first, second).all():
            raise LayerError(
                f"{name!r} reaches both {one.name} and {two.name}, which end in two states; give "
                "each call of a layer a state of its own, and return each"
            )
    return [slot for slot, _ in found]
