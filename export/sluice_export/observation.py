"""Watches what happens inside a module while it is called."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from sluice_export.errors import LayerError
from sluice_export.layers import RecurrentLayer
from sluice_export.signature import Signature


@dataclass(frozen=True)
class LayerCall:
    """What one recurrent layer was given and gave, in one call of the module."""

    layer: RecurrentLayer
    sequence: Tensor
    before: tuple[Tensor, ...]  # empty: the layer was called without a state
    after: tuple[Tensor, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """The batch and the steps that the layer saw."""
        first, second = self.sequence.shape[:2]
        return (first, second) if self.layer.module.batch_first else (second, first)


@dataclass
class Observation:
    """What happened inside a module during one call."""

    result: Any = None
    layers: list[LayerCall] = field(default_factory=list)
    lookups: list[tuple[nn.Embedding, Tensor]] = field(default_factory=list)


def observe(
    signature: Signature,
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    inputs: Sequence[Tensor],
) -> Observation:
    """Call `module` once on inputs [batch, steps, …] and tell what happened inside."""
    with watch(module, layers) as seen:
        seen.result = signature.call(module, inputs)
    return seen


@contextmanager
def watch(module: nn.Module, layers: Sequence[RecurrentLayer]) -> Iterator[Observation]:
    """Note what layers and embeddings are given, without gradients, while the block runs."""
    threads = torch.get_num_threads()
    seen = Observation()
    handles = [
        layer.module.register_forward_hook(_layer_hook(layer, seen), with_kwargs=True)
        for layer in layers
    ]
    handles += [
        child.register_forward_hook(_lookup_hook(child, seen), with_kwargs=True)
        for child in module.modules()
        if isinstance(child, nn.Embedding)
    ]
    try:
        # So little work is slower on several threads, much slower where cores are busy.
        torch.set_num_threads(1)
        with torch.no_grad():
            yield seen
    finally:
        torch.set_num_threads(threads)
        for handle in handles:
            handle.remove()


def _layer_hook(layer: RecurrentLayer, seen: Observation) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        sequence = given["input"]
        if isinstance(sequence, PackedSequence):
            raise LayerError(
                f"{layer.name} is given a packed sequence; leave out pack_padded_sequence and "
                "pad_packed_sequence: the exported model takes the lengths of its rows by itself"
            )
        before = tuple(t for t in pytree.tree_leaves(given.get("hx")) if isinstance(t, Tensor))
        after = tuple(pytree.tree_leaves(result[1]))
        seen.layers.append(LayerCall(layer, sequence, before, after))

    return note


def _lookup_hook(table: nn.Embedding, seen: Observation) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: object) -> None:
        seen.lookups.append((table, args[0] if args else kwargs["input"]))

    return note
