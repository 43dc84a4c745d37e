"""Finds the outputs among the results of a module: those that are not its state."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sluice_export.errors import LayerError, OutputError, notify
from sluice_export.torch.recording import Recording
from sluice_export.torch.signature import LARGE, SMALL, OutputLeaf
from sluice_protos.datatypes import DATATYPES

_BATCH: Final = (SMALL[0], LARGE[0])
_STEPS: Final = (SMALL[1], LARGE[1])
_TYPES: Final = frozenset(torch.from_numpy(np.empty(0, kind)).dtype for kind in DATATYPES)
_MERGED: Final = (SMALL[0] * SMALL[1], LARGE[0] * LARGE[1])


@dataclass(frozen=True)
class CarriedState:
    """A state argument of a call with LARGE sizes."""

    name: str
    shape: tuple[int, ...]
    # The last states of the layers that it reached.
    ends: tuple[Tensor, ...]


def find_outputs(
    small: Recording,
    large: Recording,
    names: Sequence[str] | None,
    *,
    ends: Sequence[Tensor],
    carried: Sequence[CarriedState],
) -> tuple[OutputLeaf, ...]:
    """The results with a row for each sequence, named; states of layers only if nothing else is.

    `small` and `large` are calls with SMALL and LARGE (batch, steps), `ends` the last states of
    the layers in the large one. Raises OutputError for any other result, LayerError where
    another state comes back than the layer's.
    """
    paths, _ = pytree.tree_flatten_with_path(small.result)
    leaves = pytree.tree_leaves(large.result)
    shapes = {state.shape for state in carried}
    found: list[OutputLeaf] = []
    kept: list[OutputLeaf] = []
    for index, ((path, one), two) in enumerate(zip(paths, leaves, strict=True)):
        if one is None:
            continue
        if not isinstance(one, Tensor):
            raise OutputError(f"forward returns a {type(one).__name__}; return tensors only")
        axes = _find_axes(one, two, index)
        is_state = _is_state(two, ends, shapes)
        (kept if is_state else found).append(_make_output(index, _key(path), one, axes))
    if not found and not kept:
        raise OutputError("forward returns no tensor; return one with a row for every sequence")
    if found:
        _check_returned([leaves[o.index] for o in found], [leaves[o.index] for o in kept], carried)
    for output in kept if found else ():
        result = leaves[output.index]
        if not shapes and not any(_is_same(result, end) for end in ends):
            notify(
                f"result {output.index} of forward is made of states of layers, so it is carried "
                "and is no output. To make it an output, return it in another shape"
            )
    return _name(found or kept, names)


def _is_same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _is_state(tensor: Tensor, ends: Sequence[Tensor], shapes: Collection[tuple[int, ...]]) -> bool:
    """Whether a result is the last state of a layer, or several in the shape of a state argument.

    The last step of a layer's output has the same numbers in another shape, and is no state.
    """
    held = [end for end in ends if end.dtype == tensor.dtype and torch.isin(end, tensor).all()]
    if not held or not torch.isin(tensor, torch.cat([end.flatten() for end in held])).all():
        return False
    is_stack = len(held) > 1 and tensor.numel() == sum(end.numel() for end in held)
    return is_stack or tensor.shape in {*shapes, *(end.shape for end in held)}


def _check_returned(
    outputs: Sequence[Tensor], states: Sequence[Tensor], carried: Sequence[CarriedState]
) -> None:
    """Raise LayerError where an output seems to be the next value of a state argument."""
    for state in carried:
        is_returned = all(
            any(end.dtype == s.dtype and torch.isin(end, s).all() for s in states)
            for end in state.ends
        )
        if not is_returned and any(output.shape == state.shape for output in outputs):
            raise LayerError(
                f"forward takes {state.name!r} as a state, but returns, in its shape, another "
                "value than the last state of the layer, which a stream carries; return the state "
                "as the layer returned it, and beside it what is computed from it"
            )


def _key(path: Sequence[Any]) -> str:
    """The name of a result: its key in a dict, or its field of a named tuple; "" for none."""
    keys = [getattr(step, "key", getattr(step, "name", None)) for step in path]
    return "_".join(str(key) for key in keys if key is not None)


def _name(found: Sequence[OutputLeaf], names: Sequence[str] | None) -> tuple[OutputLeaf, ...]:
    """The outputs under `names`; without any, under their own names or "y"."""
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
    """The axes of a result that grow with the batch, the steps or both: by their two sizes."""
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


def _make_output(
    index: int, name: str, tensor: Tensor, axes: dict[tuple[int, int], int]
) -> OutputLeaf:
    if tensor.dtype not in _TYPES:
        raise OutputError(
            f"result {index} of forward is of {tensor.dtype}, which no client reads; cast it in "
            "forward: .to(torch.float32), of a complex one its .real and .imag"
        )
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
