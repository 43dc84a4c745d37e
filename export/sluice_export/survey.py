"""Finds out, by calling it, how a module wants to be called and what its layers are given."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from sluice_export.errors import InputError, LayerError, OutputError, UnsupportedModuleError
from sluice_export.layers import RecurrentLayer
from sluice_export.signature import InputLeaf, OutputLeaf, Signature, StateLeaf, draw

# Batch and steps of two calls. All four differ, so that an axis which follows
# one of them shows it.
_SMALL: Final = (3, 7)
_LARGE: Final = (5, 11)


@dataclass(frozen=True)
class LayerCall:
    """What one recurrent layer was given and gave, in one call of the module."""

    layer: RecurrentLayer
    sequence: Tensor
    before: tuple[Tensor, ...]  # empty: the layer was called without a state
    after: tuple[Tensor, ...]


@dataclass
class Observation:
    """What happened inside a module during one call."""

    results: list[Any]
    layers: list[LayerCall]
    lookups: list[tuple[nn.Embedding, Tensor]]


@dataclass(frozen=True)
class Survey:
    """What is known of a module before it is exported."""

    signature: Signature
    # The state before the first step where it is not zero: part name to [hidden_size].
    initial: dict[str, Tensor]


@dataclass(frozen=True)
class _Argument:
    """A flattened example argument."""

    index: int
    name: str
    tensor: Tensor


def take_survey(
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    example_inputs: object,
    *,
    valid: Mapping[str, tuple[int, int]],
    output_names: Sequence[str] | None,
) -> Survey:
    """Call `module` (in eval mode) a few times and watch it.

    `example_inputs` is a tensor, a tuple of arguments, or a dict of named ones,
    in the module's own layout. Raises InputError, LayerError, OutputError or
    UnsupportedModuleError.
    """
    structure, constants, arguments = _flatten(module, example_inputs)
    states, ranges = _first_look(module, layers, structure, constants, arguments)
    ranges.update({a.index: valid[a.name] for a in arguments if a.name in valid})
    signature, small = _find_layout(
        module, layers, structure, constants, arguments, states, ranges, known=set(valid)
    )
    large = observe(signature, module, layers, signature.random_inputs(*_LARGE, seed=2))
    _check_repeats(signature, module, small)
    outputs = _find_outputs(small, large, output_names)
    initial = _find_initial(signature, small, large)
    return Survey(replace(signature, outputs=outputs), initial)


def observe(
    signature: Signature,
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    inputs: Sequence[Tensor],
) -> Observation:
    """Call `module` once on inputs [batch, steps, …] and tell what its layers were given."""
    with _watch(module, layers) as seen, torch.no_grad():
        seen.results = signature.call(module, inputs)
    return seen


@contextmanager
def _watch(module: nn.Module, layers: Sequence[RecurrentLayer]) -> Iterator[Observation]:
    """Note what layers and embeddings are given while the block runs."""
    seen = Observation([], [], [])

    def note_layer(layer: RecurrentLayer) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
            if isinstance(given["input"], PackedSequence):
                raise LayerError(
                    f"{layer.name} is given a packed sequence; leave out pack_padded_sequence: "
                    "the exported model takes the lengths of its rows by itself"
                )
            before = pytree.tree_leaves(given.get("hx"))
            seen.layers.append(
                LayerCall(
                    layer,
                    given["input"].detach(),
                    tuple(x for x in before if isinstance(x, Tensor)),
                    tuple(pytree.tree_leaves(result[1])),
                )
            )

        return hook

    def note_lookup(table: nn.Module, args: tuple[Any, ...], _: object) -> None:
        assert isinstance(table, nn.Embedding)
        seen.lookups.append((table, args[0].detach()))

    handles = [
        layer.module.register_forward_hook(note_layer(layer), with_kwargs=True) for layer in layers
    ]
    handles += [
        child.register_forward_hook(note_lookup)
        for child in module.modules()
        if isinstance(child, nn.Embedding)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _flatten(
    module: nn.Module, example_inputs: object
) -> tuple[pytree.TreeSpec, dict[int, Any], list[_Argument]]:
    """The structure of the arguments, those that are no tensors, and the tensors with names."""
    args, kwargs = _as_call(example_inputs)
    paths, structure = pytree.tree_flatten_with_path((args, kwargs))
    names = _argument_names(module, len(args))
    constants: dict[int, Any] = {}
    arguments: list[_Argument] = []
    for index, (path, leaf) in enumerate(paths):
        keys = [str(getattr(key, "idx", getattr(key, "key", key))) for key in path]
        first = names[int(keys[1])] if keys[0] == "0" else keys[1]
        name = "_".join([first, *keys[2:]])
        tensor = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        if not isinstance(tensor, Tensor):
            constants[index] = leaf
        elif tensor.dim() < 2:
            raise InputError(
                f"input {name!r} has shape {list(tensor.shape)}: every input needs a batch and a "
                "time axis. Leave it out of example_inputs (Sluice gives the lengths of rows to "
                "the layers itself), give it as a plain number to fix it at export, or wrap the "
                "module in one whose forward sets it"
            )
        else:
            arguments.append(_Argument(index, name, tensor.detach().cpu()))
    if not arguments:
        raise InputError("example_inputs has no tensor; give one such as torch.zeros(1, 5, 8)")
    return structure, constants, arguments


def _as_call(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _argument_names(module: nn.Module, count: int) -> list[str]:
    """What forward calls its first `count` arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    if isinstance(module, nn.RNNBase):
        named = ["x", "state"]
    return (named + [f"input_{place}" for place in range(count)])[: max(count, len(named))]


def _first_look(
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    structure: pytree.TreeSpec,
    constants: dict[int, Any],
    arguments: Sequence[_Argument],
) -> tuple[set[int], dict[int, tuple[int, int]]]:
    """Which arguments reach a layer as its state, and the valid values of those that index tables.

    The module is called with the example's own shapes and integers, and random
    numbers in the place of the example's.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = dict(constants)
    for argument in arguments:
        tensor = argument.tensor
        if tensor.is_floating_point():
            tensor = draw(tensor.dtype, tensor.shape, None, generator)
        leaves[argument.index] = tensor
    args, kwargs = pytree.tree_unflatten([leaves[i] for i in range(len(leaves))], structure)
    try:
        with _watch(module, layers) as seen, torch.no_grad():
            seen.results = pytree.tree_leaves(module(*args, **kwargs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"the module's forward failed on the example inputs ({_first_line(error)}); "
            "give example_inputs that it accepts, in its own layout"
        ) from error
    _check_calls(layers, seen)
    given = [tensor for call in seen.layers for tensor in call.before]
    states = {
        argument.index
        for argument in arguments
        if argument.tensor.is_floating_point()
        and any(torch.isin(tensor, leaves[argument.index]).all() for tensor in given)
    }
    integers = [a for a in arguments if not a.tensor.is_floating_point()]
    return states, _valid_ranges(integers, leaves, seen.lookups)


def _valid_ranges(
    integers: Sequence[_Argument],
    leaves: Mapping[int, Any],
    lookups: Sequence[tuple[nn.Embedding, Tensor]],
) -> dict[int, tuple[int, int]]:
    """For each integer argument that an nn.Embedding is called with: the values it may have."""
    ranges: dict[int, tuple[int, int]] = {}
    for table, indices in lookups:
        for argument in integers:
            leaf: Tensor = leaves[argument.index]
            is_view = leaf.untyped_storage().data_ptr() == indices.untyped_storage().data_ptr()
            is_same = leaf.numel() == indices.numel() and torch.equal(
                leaf.flatten().sort().values.long(), indices.flatten().sort().values.long()
            )
            if is_view or is_same:
                _, high = ranges.get(argument.index, (0, table.num_embeddings - 1))
                ranges[argument.index] = (0, min(high, table.num_embeddings - 1))
    return ranges


def _check_calls(layers: Sequence[RecurrentLayer], seen: Observation) -> None:
    """Raise LayerError unless each layer was called once, on a batch of sequences."""
    for layer in layers:
        calls = [call for call in seen.layers if call.layer is layer]
        if not calls:
            raise LayerError(
                f"{layer.name} is never called by forward, so its state cannot be carried; "
                "remove it from the module before the export"
            )
        if len(calls) > 1:
            raise LayerError(
                f"{layer.name} is called {len(calls)} times in one forward, and has one state to "
                "carry; call it once over the whole sequence, or give each call its own layer"
            )
        if calls[0].sequence.dim() != 3:
            raise LayerError(
                f"{layer.name} is given a sequence without a batch axis, "
                f"{list(calls[0].sequence.shape)}; give it [batch, steps, features] "
                "(batch_first=True) or [steps, batch, features]"
            )


def _find_layout(
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    structure: pytree.TreeSpec,
    constants: dict[int, Any],
    arguments: Sequence[_Argument],
    states: set[int],
    ranges: Mapping[int, tuple[int, int]],
    *,
    known: set[str],
) -> tuple[Signature, Observation]:
    """The signature under which each layer sees the batch and the steps it is given."""
    failure: Exception | None = None
    sizes = ""
    held = [argument for argument in arguments if argument.index in states]
    inputs = tuple(
        InputLeaf(a.index, a.name, a.tensor.dtype, tuple(a.tensor.shape[2:]), _range(a, ranges))
        for a in arguments
        if a.index not in states
    )
    if not inputs:
        raise InputError("every example input is a state; give the sequence too")
    # A state is mostly [layers, batch, hidden]: try that first.
    axes = [sorted(range(a.tensor.dim()), key=lambda axis: (axis != 1, axis)) for a in held]
    for is_batch_first, *chosen in itertools.product((True, False), *axes):
        leaves = tuple(
            StateLeaf(a.index, tuple(a.tensor.shape), axis, a.tensor.dtype)
            for a, axis in zip(held, chosen, strict=True)
        )
        signature = Signature(structure, constants, inputs, leaves, is_batch_first)
        try:
            seen = observe(signature, module, layers, signature.random_inputs(*_SMALL, seed=1))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            failure = failure or error
            continue
        misfits = [call for call in seen.layers if not _fits(call)]
        if not misfits:
            return signature, seen
        sizes = sizes or _describe(misfits[0])
    if sizes:
        raise LayerError(
            f"{sizes} when the module is given {_SMALL[0]} sequences of {_SMALL[1]} steps; "
            "each sequence must reach each layer as one row, each step as one step"
        )
    hint = "" if known else "; if an input's integers have a range, give it as valid={name: (0, 9)}"
    raise InputError(
        f"forward failed on {_SMALL[0]} sequences of {_SMALL[1]} steps "
        f"({_first_line(failure)}); it must take any number of both{hint}"
    ) from failure


def _range(argument: _Argument, ranges: Mapping[int, tuple[int, int]]) -> tuple[int, int] | None:
    return ranges.get(argument.index)


def _fits(call: LayerCall) -> bool:
    """Whether a layer saw the batch and the steps of the small call."""
    batch, steps = _SMALL
    is_batch_first = call.layer.module.batch_first
    expected = (batch, steps) if is_batch_first else (steps, batch)
    return tuple(call.sequence.shape[:2]) == expected


def _describe(call: LayerCall) -> str:
    sizes = list(call.sequence.shape[:2])
    batch, steps = sizes if call.layer.module.batch_first else reversed(sizes)
    return f"{call.layer.name} sees {batch} sequences of {steps} steps"


def _check_repeats(signature: Signature, module: nn.Module, first: Observation) -> None:
    """Raise UnsupportedModuleError when a second call on the same inputs gives something else."""
    with torch.no_grad():
        again = signature.call(module, signature.random_inputs(*_SMALL, seed=1))
    for before, after in zip(first.results, again, strict=True):
        if isinstance(before, Tensor) and not torch.equal(before.nan_to_num(), after.nan_to_num()):
            raise UnsupportedModuleError(
                "two calls of the module on the same input differ: it keeps a state in an "
                "attribute or draws random numbers; pass the state through forward, or leave it "
                "to the layers (call them without one)"
            )


def _find_outputs(
    small: Observation, large: Observation, names: Sequence[str] | None
) -> tuple[OutputLeaf, ...]:
    """The results with a batch and a time axis; those that are a layer's state are left out."""
    found: list[OutputLeaf] = []
    states = [tensor.flatten() for call in large.layers for tensor in call.after]
    state_values = torch.cat(states) if states else torch.empty(0)
    for index, (one, two) in enumerate(zip(small.results, large.results, strict=True)):
        if one is None:
            continue
        if not isinstance(one, Tensor):
            raise OutputError(f"forward returns a {type(one).__name__}; return tensors only")
        batch, steps = _find_axes(one, two, index)
        if steps is None and torch.isin(two, state_values).all():
            continue
        if batch is None or steps is None:
            raise OutputError(_missing_axis(index, list(one.shape), batch))
        shape = tuple(n for axis, n in enumerate(one.shape) if axis not in (batch, steps))
        found.append(OutputLeaf(index, "", one.dtype, shape, batch, steps))
    if not found:
        raise OutputError("forward returns no tensor with a row for every step; return one")
    default = ["y"] if len(found) == 1 else [f"y_{place}" for place in range(len(found))]
    names = list(names or default)
    if len(names) != len(found):
        raise OutputError(f"forward returns {len(found)} outputs; {len(names)} names were given")
    return tuple(replace(leaf, name=name) for leaf, name in zip(found, names, strict=True))


def _find_axes(one: Tensor, two: Tensor, index: int) -> tuple[int | None, int | None]:
    """Where a result has its batch and time axis, by the sizes it had in two calls."""
    axes: dict[tuple[int, int], int] = {}
    for axis, sizes in enumerate(zip(one.shape, two.shape, strict=True)):
        if sizes[0] == sizes[1]:
            continue
        if sizes in axes or sizes not in zip(_SMALL, _LARGE, strict=True):
            raise OutputError(
                f"result {index} of forward has shape {list(one.shape)} for {_SMALL[0]} sequences "
                f"of {_SMALL[1]} steps and {list(two.shape)} for {_LARGE[0]} of {_LARGE[1]}; "
                "return [batch, steps, …] (or [steps, batch, …]): one row for every step of every "
                "sequence, without merging the two axes"
            )
        axes[sizes] = axis
    batch, steps = zip(_SMALL, _LARGE, strict=True)
    return axes.get(batch), axes.get(steps)


def _missing_axis(index: int, shape: list[int], batch: int | None) -> str:
    if batch is None:
        return (
            f"result {index} of forward, {shape}, has no batch axis; "
            "return one row for every step of every sequence"
        )
    return (
        f"result {index} of forward, {shape}, has no time axis: it is one value for the whole "
        "sequence (such as y[:, -1], or h of the last step). A stream gives an output at every "
        "step: apply the head to every step, head(y) rather than head(y[:, -1])"
    )


def _find_initial(
    signature: Signature, small: Observation, large: Observation
) -> dict[str, Tensor]:
    """The initial state of each part that does not start at zero.

    Raises LayerError where a layer starts from something that depends on the input.
    """
    initial: dict[str, Tensor] = {}
    for one, two in zip(small.layers, large.layers, strict=True):
        layer = one.layer
        for place, (first, second) in enumerate(zip(one.before, two.before, strict=True)):
            rows = torch.cat([first, second], dim=1)
            if first.shape[1] != _SMALL[0] or not torch.equal(rows, rows[:, :1].expand_as(rows)):
                raise LayerError(
                    f"{layer.name} starts from a state computed from the input; a stream carries "
                    "the state from step to step, so it must start from zeros, from a constant, "
                    "or from a state that is an argument of forward"
                )
            for depth in range(layer.module.num_layers):
                value = rows[depth, 0]
                if value.any():
                    name = f"{layer.name}.{layer.kind.states[place]}.{depth}"
                    initial[name] = value
    return initial


def _first_line(error: BaseException | None) -> str:
    """The first line of what an error says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
