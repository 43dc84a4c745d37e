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
from sluice_export.torch.convolutions import CausalConvolution, ConvolutionCall
from sluice_export.torch.layers import RecurrentLayer
from sluice_export.torch.signature import Signature


@dataclass(frozen=True)
class LayerCall:
    """What one recurrent layer or cell was given and gave, in one call of the module."""

    path: str
    sizes: tuple[int, int] | None  # the batch and the steps that it saw; None: without a batch
    before: tuple[Tensor, ...]  # [depth, batch, hidden]; empty: it was called without a state
    after: tuple[Tensor, ...]  # [depth, batch, hidden]


@dataclass
class Observation:
    """What happened inside a module during one call."""

    result: Any = None
    layers: list[LayerCall] = field(default_factory=list)
    convolutions: list[ConvolutionCall] = field(default_factory=list)
    lookups: list[tuple[nn.Embedding, Tensor]] = field(default_factory=list)

    def calls(self, layer: RecurrentLayer) -> list[LayerCall]:
        """The calls of one layer, in order."""
        return [call for call in self.layers if call.path == layer.path]

    def last_calls(self, layer: RecurrentLayer) -> list[LayerCall]:
        """The calls of one layer that left it with its states; `layer` knows how many."""
        return self.calls(layer)[-layer.calls :]

    def ends(self, layer: RecurrentLayer) -> list[Tensor]:
        """Each state that a layer was left with, as it gave it: a cell's without a depth."""
        is_cell = isinstance(layer.module, nn.RNNCellBase)
        states = [state for call in self.last_calls(layer) for state in call.after]
        return [state[0] if is_cell else state for state in states]

    def last_states(self, carriers: Sequence[RecurrentLayer | CausalConvolution]) -> dict[str, Any]:
        """The state that `carriers` were left with: part name to [batch, …].

        Without the h of layers with a projection: PyTorch gives it projected only.
        """
        states: dict[str, Any] = {}
        for carrier in carriers:
            if isinstance(carrier, CausalConvolution):
                given = [call.given for call in self.convolutions if call.module is carrier.module]
                states[carrier.part] = carrier.context(given[0])
                continue
            for number, call in enumerate(self.last_calls(carrier)):
                for state, tensor in zip(carrier.kind.states, call.after, strict=True):
                    if tensor.shape[-1] == carrier.module.hidden_size:
                        for depth in range(carrier.depth):
                            states[carrier.part(number, state, depth)] = tensor[depth]
        return states


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
    """Note what layers, convolutions and embeddings are given while the block runs.

    Without gradients.
    """
    threads = torch.get_num_threads()
    seen = Observation()
    handles = [
        layer.module.register_forward_hook(_layer_hook(layer, seen), with_kwargs=True)
        for layer in layers
    ]
    for child in module.modules():
        if isinstance(child, nn.Embedding):
            hook = _lookup_hook(child, seen)
        elif isinstance(child, nn.Conv1d):
            hook = _convolution_hook(child, seen)
        else:
            continue
        handles.append(child.register_forward_hook(hook, with_kwargs=True))
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
    is_cell = isinstance(layer.module, nn.RNNCellBase)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        sequence = given["input"]
        if isinstance(sequence, PackedSequence):
            raise LayerError(
                f"{layer.name} is given a packed sequence; leave out pack_padded_sequence and "
                "pad_packed_sequence: the exported model takes the lengths of its rows by itself"
            )
        before = tuple(t for t in pytree.tree_leaves(given.get("hx")) if isinstance(t, Tensor))
        after = tuple(pytree.tree_leaves(result if is_cell else result[1]))
        if is_cell:
            before, after = (tuple(t.unsqueeze(0) for t in states) for states in (before, after))
        seen.layers.append(LayerCall(layer.path, _sizes(layer, sequence), before, after))

    return note


def _sizes(layer: RecurrentLayer, sequence: Tensor) -> tuple[int, int] | None:
    """The batch and the steps of what a layer is given; a cell is given one step."""
    if isinstance(layer.module, nn.RNNCellBase):
        return (sequence.shape[0], 1) if sequence.dim() == 2 else None
    if sequence.dim() != 3:
        return None
    first, second = sequence.shape[:2]
    return (first, second) if layer.is_batch_first else (second, first)


def _convolution_hook(child: nn.Conv1d, seen: Observation) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        given = args[0] if args else kwargs["input"]
        seen.convolutions.append(ConvolutionCall(child, given, result))

    return note


def _lookup_hook(table: nn.Embedding, seen: Observation) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: object) -> None:
        seen.lookups.append((table, args[0] if args else kwargs["input"]))

    return note
