"""Finds the outputs among what a module returns: those that are no state."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sluice_export.errors import OutputError
from sluice_export.observation import Observation
from sluice_export.signature import OutputLeaf

# Batch and steps of two calls. All that can follow from them differ, so that
# an axis which follows one of them shows it.
SMALL: Final = (3, 7)
LARGE: Final = (5, 11)

_BATCH: Final = (SMALL[0], LARGE[0])
_STEPS: Final = (SMALL[1], LARGE[1])
_MERGED: Final = (SMALL[0] * SMALL[1], LARGE[0] * LARGE[1])


def find_outputs(
    small: Observation, large: Observation, names: Sequence[str] | None
) -> tuple[OutputLeaf, ...]:
    """The results with a row for each sequence, named; a layer's own states only if alone.

    `small` and `large` are calls with SMALL and LARGE (batch, steps). Raises
    OutputError for anything else.
    """
    states = [tensor.flatten() for call in large.layers for tensor in call.after]
    paths, _ = pytree.tree_flatten_with_path(small.result)
    found: list[OutputLeaf] = []
    kept: list[OutputLeaf] = []
    for index, ((path, one), two) in enumerate(
        zip(paths, pytree.tree_leaves(large.result), strict=True)
    ):
        if one is None:
            continue
        if not isinstance(one, Tensor):
            raise OutputError(f"forward returns a {type(one).__name__}; return tensors only")
        axes = _find_axes(one, two, index)
        is_state = _STEPS not in axes and bool(states) and _is_among(two, torch.cat(states))
        (kept if is_state else found).append(_output(index, _key(path), one, axes))
    if not found and not kept:
        raise OutputError("forward returns no tensor; return one with a row for every sequence")
    return _name(found or kept, names)


def _is_among(tensor: Tensor, values: Tensor) -> bool:
    return bool(torch.isin(tensor, values).all())


def _key(path: Sequence[Any]) -> str:
    """The name that a result has already: its key in a dict or its field of a named tuple."""
    keys = [getattr(step, "key", getattr(step, "name", None)) for step in path]
    return "_".join(str(key) for key in keys if key is not None)


def _name(found: Sequence[OutputLeaf], names: Sequence[str] | None) -> tuple[OutputLeaf, ...]:
    """Outputs under `names`; where there are none, under their own or "y"."""
    if names is None:
        numbered = ["y"] if len(found) == 1 else [f"y_{place}" for place in range(len(found))]
        names = [leaf.name or number for leaf, number in zip(found, numbered, strict=True)]
    if len(names) != len(found):
        raise OutputError(
            f"forward returns {len(found)} outputs that are no state, but output_names has "
            f"{len(names)}: {', '.join(names)}"
        )
    return tuple(replace(leaf, name=name) for leaf, name in zip(found, names, strict=True))


def _find_axes(one: Tensor, two: Tensor, index: int) -> dict[tuple[int, int], int]:
    """Which axes of a result follow the batch, the steps, or both merged: (small, large) sizes."""
    axes: dict[tuple[int, int], int] = {}
    for axis, sizes in enumerate(zip(one.shape, two.shape, strict=True)):
        if sizes[0] == sizes[1]:
            continue
        if sizes in axes or sizes not in (_BATCH, _STEPS, _MERGED):
            raise OutputError(
                f"result {index} of forward has shape {list(one.shape)} for {SMALL[0]} sequences "
                f"of {SMALL[1]} steps and {list(two.shape)} for {LARGE[0]} of {LARGE[1]}; "
                "return [batch, steps, …] (or [steps, batch, …]): one row for every step of "
                "every sequence"
            )
        axes[sizes] = axis
    return axes


def _output(index: int, name: str, tensor: Tensor, axes: dict[tuple[int, int], int]) -> OutputLeaf:
    shape = tuple(size for axis, size in enumerate(tensor.shape) if axis not in axes.values())
    if axes.keys() == {_BATCH, _STEPS}:
        return OutputLeaf(index, name, tensor.dtype, shape, axes[_BATCH], axes[_STEPS])
    if axes.keys() == {_MERGED}:
        return OutputLeaf(index, name, tensor.dtype, shape, axes[_MERGED], axes[_MERGED])
    if axes.keys() == {_BATCH}:
        return OutputLeaf(index, name, tensor.dtype, shape, axes[_BATCH], None)
    raise OutputError(
        f"result {index} of forward, {list(tensor.shape)}, has no batch axis; "
        "return one row for every step of every sequence"
    )
