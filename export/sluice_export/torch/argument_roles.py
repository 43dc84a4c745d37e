"""Finds out by random numbers which arguments of a module are states, and which index a table."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluice_export.errors import InputError, LayerError, first_line
from sluice_export.torch.arguments import Arguments
from sluice_export.torch.layers import RecurrentLayer
from sluice_export.torch.recording import Observation, watch
from sluice_export.torch.signature import draw

# What a forward may raise when it is given shapes, values or types that it does not take.
REFUSALS = (
    RuntimeError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True)
class Reach:
    """Where a state argument arrives: at which state of which call of a layer."""

    layer: RecurrentLayer
    call: int
    place: int  # among the states of the layer's kind

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the {self.layer.kind.states[self.place]} of {self.layer.name}"

    def find_last(self, seen: Observation, layers: Sequence[RecurrentLayer]) -> Tensor:
        """What the layer, as found again among `layers`, is left with there."""
        layer = next(layer for layer in layers if layer.path == self.layer.path)
        return seen.last_calls(layer)[self.call % layer.calls].after[self.place]


@dataclass(frozen=True)
class Roles:
    """What the tensors among the arguments are for, by their index."""

    states: dict[int, list[Reach]]
    valid: dict[int, tuple[int, int]]


def find_roles(
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    arguments: Arguments,
    valid: Mapping[int, tuple[int, int]],
) -> Roles:
    """Which arguments reach a layer as its state, and which integers index a table.

    The module is called with the example's own shapes, and random numbers in the place of
    the example's. `valid` are the ranges that are known. Raises InputError or LayerError.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        argument.index: draw(argument.tensor.dtype, argument.tensor.shape, None, generator)
        if argument.tensor.is_floating_point()
        else argument.tensor
        for argument in arguments.tensors
    }
    try:
        seen = _call(module, layers, arguments, tensors)
    except REFUSALS as error:
        raise InputError(
            f"the module's forward failed on the example inputs ({first_line(error)}); "
            "give inputs that it accepts, in its own layout"
        ) from error
    _check_calls(layers, seen)
    names = {argument.index: argument.name for argument in arguments.tensors}
    states = {
        index: reached
        for index, leaf in tensors.items()
        if leaf.is_floating_point() and (reached := _find_reach(names[index], leaf, layers, seen))
    }
    ranges = _find_ranges(module, arguments, tensors, seen)
    return Roles(states, {**ranges, **valid})


def _call(
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    arguments: Arguments,
    tensors: Mapping[int, Tensor],
) -> Observation:
    with watch(module, layers) as seen:
        arguments.call(module, tensors)
    return seen


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


def _find_reach(
    name: str, leaf: Tensor, layers: Sequence[RecurrentLayer], seen: Observation
) -> list[Reach]:
    """Where a tensor arrives as a state. Raises LayerError where one value of it does twice."""
    found: list[tuple[Reach, Tensor]] = []
    for layer in layers:
        for number, call in enumerate(seen.calls(layer)):
            found += [
                (Reach(layer, number, place), tensor)
                for place, tensor in enumerate(call.before)
                if torch.isin(tensor, leaf).all()
            ]
    for (one, first), (two, second) in itertools.combinations(found, 2):
        if torch.isin(first, second).all():
            raise LayerError(
                f"{name!r} reaches both {one.name} and {two.name}, which end as two states; give "
                "each call of a layer a state of its own, and return each"
            )
    return [reach for reach, _ in found]


def _find_ranges(
    module: nn.Module,
    arguments: Arguments,
    tensors: Mapping[int, Tensor],
    seen: Observation,
) -> dict[int, tuple[int, int]]:
    """The ranges of those integers that all go, as they are, into tables of one size."""
    generator = torch.Generator().manual_seed(0)
    smallest = min((table.num_embeddings for table, _ in seen.lookups), default=1)
    leaves = {
        index: leaf
        for index, leaf in tensors.items()
        if not leaf.is_floating_point() and leaf.dtype != torch.bool
    }
    drawn = {
        index: draw(leaf.dtype, leaf.shape, (0, _last(leaf, smallest)), generator)
        for index, leaf in leaves.items()
    }
    try:
        seen = _call(module, (), arguments, {**tensors, **drawn})
        leaves = drawn
    except REFUSALS:
        pass  # A range of its own; the example's integers have to do.
    ranges = {}
    for index, leaf in leaves.items():
        read = [
            (table, indices)
            for table, indices in seen.lookups
            if index in _find_sources(indices, leaves)
        ]
        sizes = {table.num_embeddings for table, _ in read}
        if len(sizes) == 1 and sum(indices.numel() for _, indices in read) >= leaf.numel():
            last = _last(leaf, *sizes)
            # What is taken modulo the size, or clamped to it, has a range that nobody told.
            if _is_refused(module, arguments, tensors, index, last + 1):
                ranges[index] = (0, last)
    return ranges


def _last(leaf: Tensor, size: int) -> int:
    """The last row of a table of `size` that integers of the type of `leaf` can name."""
    return min(size - 1, torch.iinfo(leaf.dtype).max)


def _find_sources(indices: Tensor, leaves: Mapping[int, Tensor]) -> list[int]:
    """Whose integers `indices` are: of the leaf in whose memory they lie, or with their numbers."""
    place = indices.untyped_storage().data_ptr()
    within = [i for i, leaf in leaves.items() if leaf.untyped_storage().data_ptr() == place]
    numbers = indices.flatten().long().sort().values
    return within or [
        index
        for index, leaf in leaves.items()
        if leaf.numel() == numbers.numel()
        and torch.equal(leaf.flatten().long().sort().values, numbers)
    ]


def _is_refused(
    module: nn.Module,
    arguments: Arguments,
    tensors: Mapping[int, Tensor],
    index: int,
    value: int,
) -> bool:
    """Whether the module does not take `value` in one of its arguments."""
    try:
        spoiled = torch.full_like(tensors[index], value)
        _call(module, (), arguments, {**tensors, index: spoiled})
    except REFUSALS:
        return True
    return False
