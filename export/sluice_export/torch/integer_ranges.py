"""Finds the valid values of integer arguments: the rows of the tables that they index."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sluice_export.torch.arguments import FORWARD_ERRORS, Arguments
from sluice_export.torch.recording import Recording, record_call
from sluice_export.torch.signature import draw


def find_ranges(
    module: nn.Module, arguments: Arguments, tensors: Mapping[int, Tensor], recording: Recording
) -> dict[int, tuple[int, int]]:
    """(first, last) of the integers that all go, unchanged, into tables of one size, by index.

    `recording` is a call of `module` with `tensors`. Further calls, with random integers, show
    which argument's values a table is given.
    """
    generator = torch.Generator().manual_seed(0)
    smallest = min((table.num_embeddings for table, _ in recording.lookups), default=1)
    leaves = {
        index: leaf
        for index, leaf in tensors.items()
        if not leaf.is_floating_point() and leaf.dtype != torch.bool
    }
    drawn = {
        index: draw(leaf.dtype, leaf.shape, (0, _last_row(leaf, smallest)), generator)
        for index, leaf in leaves.items()
    }
    try:
        recording = record_call(arguments.call, module, (), {**tensors, **drawn})
        leaves = drawn
    except FORWARD_ERRORS:
        pass  # Other values are valid; the integers of the example are used instead.
    ranges = {}
    for index, leaf in leaves.items():
        read = [
            (table, indices)
            for table, indices in recording.lookups
            if index in _find_sources(indices, leaves)
        ]
        sizes = {table.num_embeddings for table, _ in read}
        if len(sizes) == 1 and sum(indices.numel() for _, indices in read) >= leaf.numel():
            last = _last_row(leaf, *sizes)
            # Values that are taken modulo the size, or clamped to it, may have any range.
            if _is_refused(module, arguments, tensors, index, last + 1):
                ranges[index] = (0, last)
    return ranges


def _last_row(leaf: Tensor, size: int) -> int:
    """The last row of a table of `size` that integers of the type of `leaf` can name."""
    return min(size - 1, torch.iinfo(leaf.dtype).max)


def _find_sources(indices: Tensor, leaves: Mapping[int, Tensor]) -> list[int]:
    """The leaves that `indices` come from: in the same memory, or else with the same numbers."""
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
    module: nn.Module, arguments: Arguments, tensors: Mapping[int, Tensor], index: int, value: int
) -> bool:
    """Whether the module does not accept `value` in one of its arguments."""
    try:
        spoiled = torch.full_like(tensors[index], value)
        record_call(arguments.call, module, (), {**tensors, index: spoiled})
    except FORWARD_ERRORS:
        return True
    return False
