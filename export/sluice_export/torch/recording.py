"""Records what layers, convolutions and embeddings are given while a module is called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from sluice_export.errors import LayerError
from sluice_export.torch.convolutions import CausalConvolution, ConvolutionCall, StatefulLayer
from sluice_export.torch.layers import RecurrentLayer


@dataclass(frozen=True)
class LayerCall:
    """The states of one recurrent layer or cell before and after it was called."""

    path: str
    sizes: tuple[int, int] | None  # batch and steps of its input; None: it had no batch
    before: tuple[Tensor, ...]  # [depth, batch, hidden] each; empty: called without a state
    after: tuple[Tensor, ...]  # [depth, batch, hidden]


@dataclass
class Recording:
    """What happened inside a module in one call."""

    result: Any = None
    layer_calls: list[LayerCall] = field(default_factory=list)
    convolution_calls: list[ConvolutionCall] = field(default_factory=list)
    lookups: list[tuple[nn.Embedding, Tensor]] = field(default_factory=list)

    def calls(self, layer: RecurrentLayer) -> list[LayerCall]:
        """The calls of one layer, in order."""
        return [call for call in self.layer_calls if call.path == layer.path]

    def last_calls(self, layer: RecurrentLayer) -> list[LayerCall]:
        """The calls of one layer that gave it its last states; `layer` knows how many."""
        return self.calls(layer)[-layer.calls :]

    def ends(self, layer: RecurrentLayer) -> list[Tensor]:
        """The last states of one layer, as it returned them: a cell's without a depth axis."""
        is_cell = isinstance(layer.module, nn.RNNCellBase)
        states = [state for call in self.last_calls(layer) for state in call.after]
        return [state[0] if is_cell else state for state in states]

    def context(self, convolution: CausalConvolution) -> Tensor:
        """The last context of one convolution, [batch, channels, width]."""
        calls = [c for c in self.convolution_calls if c.module is convolution.module]
        return convolution.context(calls[0].given)

    def last_states(self, stateful: Sequence[StatefulLayer]) -> dict[str, Tensor]:
        """The last states of the `stateful` layers: part name to [batch, …].

        Without the h of layers with a projection: PyTorch returns it only after the projection.
        """
        states: dict[str, Tensor] = {}
        for layer in stateful:
            if isinstance(layer, CausalConvolution):
                states[layer.part] = self.context(layer)
                continue
            for number, call in enumerate(self.last_calls(layer)):
                for state, tensor in zip(layer.kind.states, call.after, strict=True):
                    if tensor.shape[-1] == layer.module.hidden_size:
                        for depth in range(layer.depth):
                            states[layer.part(number, state, depth)] = tensor[depth]
        return states


def record_call(
    call: Callable[[nn.Module, Any], Any],
    module: nn.Module,
    layers: Sequence[RecurrentLayer],
    given: Any,
) -> Recording:
    """Call `module` as `call(module, given)`, without gradients, and record what happens inside.

    Calls of `layers` are recorded, and those of every convolution and embedding.
    """
    recording = Recording()
    handles = [
        layer.module.register_forward_hook(_layer_hook(layer, recording), with_kwargs=True)
        for layer in layers
    ]
    for child in module.modules():
        if isinstance(child, nn.Embedding):
            hook = _lookup_hook(child, recording)
        elif isinstance(child, nn.Conv1d):
            hook = _convolution_hook(child, recording)
        else:
            continue
        handles.append(child.register_forward_hook(hook, with_kwargs=True))
    threads = torch.get_num_threads()
    try:
        # Work this small is slower on several threads, much slower where cores are busy.
        torch.set_num_threads(1)
        with torch.no_grad():
            recording.result = call(module, given)
    finally:
        torch.set_num_threads(threads)
        for handle in handles:
            handle.remove()
    return recording


def _layer_hook(layer: RecurrentLayer, recording: Recording) -> Callable[..., None]:
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
        recording.layer_calls.append(LayerCall(layer.path, _sizes(layer, sequence), before, after))

    return note


def _sizes(layer: RecurrentLayer, sequence: Tensor) -> tuple[int, int] | None:
    """The batch and the steps of a layer's input; a cell gets one step."""
    if isinstance(layer.module, nn.RNNCellBase):
        return (sequence.shape[0], 1) if sequence.dim() == 2 else None
    if sequence.dim() != 3:
        return None
    first, second = sequence.shape[:2]
    return (first, second) if layer.is_batch_first else (second, first)


def _convolution_hook(child: nn.Conv1d, recording: Recording) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        given = args[0] if args else kwargs["input"]
        recording.convolution_calls.append(ConvolutionCall(child, given, result))

    return note


def _lookup_hook(table: nn.Embedding, recording: Recording) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: object) -> None:
        recording.lookups.append((table, args[0] if args else kwargs["input"]))

    return note
