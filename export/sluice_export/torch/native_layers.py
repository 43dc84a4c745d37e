"""Replaces stateful layers while a module is traced: by ONNX operators with the state outside."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from sluice_export.torch.convolutions import CausalConvolution, StatefulLayer
from sluice_export.torch.layers import RecurrentLayer, reorder_gates


@dataclass
class StateExchange:
    """What the caller and the layers of a traced module pass to each other in one run."""

    lengths: Tensor = field(default_factory=lambda: torch.empty(0))
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    # (batch, steps) where the module sees one step of each of batch × steps sequences.
    merged: tuple[int, int] | None = None

    def split_axes(self, rows: Tensor) -> Tensor:
        """[batch × steps, …] as [batch, steps, …]."""
        assert self.merged is not None
        return rows.reshape(*self.merged, *rows.shape[1:])


class NativeLayer(nn.Module):
    """A recurrent layer or cell as ONNX operators, which take their state from a StateExchange.

    Called like the layer that it replaces. A state that the module passes is ignored: it can
    only be the one that the caller carries, or the initial one.
    """

    def __init__(self, layer: RecurrentLayer, exchange: StateExchange) -> None:
        """Copy the weights of `layer`; `exchange` is shared with the caller."""
        super().__init__()
        self._layer = [layer]  # in lists, so that copies of the module share them
        self._exchange = [exchange]
        self._calls = 0
        original = layer.module
        self._is_cell = isinstance(original, nn.RNNCellBase)
        # The attributes that modules read to make a zero state.
        for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first"):
            setattr(self, name, getattr(original, name, None))
        self.dropout = getattr(original, "dropout", 0.0)
        self.bidirectional = False
        self.proj_size = getattr(original, "proj_size", 0)
        for depth in range(layer.depth):
            self._take_weights(original, depth)

    def _take_weights(self, original: nn.Module, depth: int) -> None:
        """Keep layer `depth`'s weights as ONNX has them: W, R and B with a direction axis."""
        kind = self._layer[0].kind
        suffix = "" if self._is_cell else f"_l{depth}"

        def read(name: str) -> Tensor:
            weight: Tensor = getattr(original, name + suffix)
            return weight.detach()

        def keep(name: str, value: Tensor) -> None:
            parameter = nn.Parameter(value.float().contiguous(), requires_grad=False)
            self.register_parameter(f"{name}{depth}", parameter)

        recurrent = read("weight_hh")
        if self.proj_size:
            # ONNX's LSTM has no projection: it is multiplied into the recurrent weights, and
            # applied behind the operator to the h that the module reads.
            projection = read("weight_hr")
            recurrent = (recurrent.double() @ projection.double()).to(recurrent.dtype)
            keep("p", projection.T)
        keep("w", reorder_gates(read("weight_ih"), kind).unsqueeze(0))
        keep("r", reorder_gates(recurrent, kind).unsqueeze(0))
        if original.bias:
            biases = [reorder_gates(read(name), kind) for name in ("bias_ih", "bias_hh")]
            keep("b", torch.cat(biases).unsqueeze(0))

    def flatten_parameters(self) -> None:
        """Do nothing: kept because modules call it on their layers."""

    def forward(self, input: Tensor, hx: object = None) -> object:  # noqa: A002 - as PyTorch's
        """Like the layer's; a cell takes [batch, features]."""
        layer, exchange = self._layer[0], self._exchange[0]
        call, self._calls = self._calls, (self._calls + 1) % layer.calls
        sequence = self._as_sequence(input)
        states: list[tuple[Tensor, ...]] = []
        for depth in range(layer.depth):
            sequence, final = self._run_operator(sequence, call, depth)
            states.append(final if exchange.merged is None else _every_step(sequence, len(final)))
        stacked = tuple(torch.stack(tensors) for tensors in zip(*states, strict=True))
        if self._is_cell:
            return stacked[0][0] if len(stacked) == 1 else tuple(part[0] for part in stacked)
        y = sequence if exchange.merged is None else _merge_axes(sequence).unsqueeze(0)
        y = y.transpose(0, 1) if self.batch_first else y
        return y, stacked if len(stacked) > 1 else stacked[0]

    def _as_sequence(self, given: Tensor) -> Tensor:
        """The input that the module passes, as [steps, batch, features]."""
        if not self._is_cell and self.batch_first:
            given = given.transpose(0, 1)
        if self._exchange[0].merged is None:
            return given
        rows = given if self._is_cell else given.squeeze(0)
        return self._exchange[0].split_axes(rows).transpose(0, 1)

    def _run_operator(
        self, sequence: Tensor, call: int, depth: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Layer `depth`: [steps, batch, in] to [steps, batch, out], and each final state."""
        layer, exchange = self._layer[0], self._exchange[0]
        names = [layer.part(call, state, depth) for state in layer.kind.states]
        steps, batch, _ = sequence.shape
        hidden = layer.module.hidden_size
        results = torch.onnx.ops.symbolic_multi_out(
            layer.kind.operator,
            [
                sequence,
                getattr(self, f"w{depth}"),
                getattr(self, f"r{depth}"),
                getattr(self, f"b{depth}") if layer.module.bias else None,
                exchange.lengths,
                *(exchange.before[name].unsqueeze(0) for name in names),
            ],
            {"hidden_size": hidden, **layer.kind.attributes},
            dtypes=[torch.float32] * (1 + len(names)),
            shapes=[[steps, 1, batch, hidden], *([1, batch, hidden] for _ in names)],
        )
        final = [tensor.squeeze(0) for tensor in results[1:]]
        exchange.after.update(zip(names, final, strict=True))
        y = results[0].squeeze(1)
        if self.proj_size:
            projection = getattr(self, f"p{depth}")
            y, final[0] = y @ projection, final[0] @ projection
        return y, tuple(final)


def _merge_axes(sequence: Tensor) -> Tensor:
    """[steps, batch, …] as [batch × steps, …]."""
    return sequence.transpose(0, 1).flatten(0, 1)


def _every_step(sequence: Tensor, states: int) -> tuple[Tensor, ...]:
    """The states after each step, [batch × steps, hidden] each; NaN for c.

    ONNX's LSTM returns h at every step, but c only at the last. With NaN a module that reads c
    fails its proofs, and one that only passes it on does not.
    """
    h = _merge_axes(sequence)
    return (h, *(torch.full_like(h, torch.nan) for _ in range(states - 1)))


class NativeConvolution(nn.Module):
    """A causal convolution that takes its left context from a StateExchange.

    It is only called with one step of each of batch × steps sequences.
    """

    def __init__(self, convolution: CausalConvolution, exchange: StateExchange) -> None:
        """Copy the weights of `convolution`; `exchange` is shared with the caller."""
        super().__init__()
        self._convolution = [convolution]
        self._exchange = [exchange]
        original = convolution.module
        for name in ("in_channels", "out_channels", "kernel_size", "dilation", "padding", "stride"):
            setattr(self, name, getattr(original, name))
        self.groups = original.groups
        self.weight = nn.Parameter(original.weight.detach(), requires_grad=False)
        # [taps × channels, out channels]
        matrix = original.weight.detach().permute(2, 1, 0).flatten(0, 1).contiguous()
        self.matrix = nn.Parameter(matrix, requires_grad=False)
        bias = original.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as PyTorch's
        """Like nn.Conv1d's on one step with its padding: [rows, channels, padding + 1]."""
        convolution, exchange = self._convolution[0], self._exchange[0]
        before = exchange.before[convolution.part].transpose(1, 2)
        joined = torch.cat([before, exchange.split_axes(input[..., -1])], dim=1)
        ends = exchange.lengths.long().unsqueeze(1) + torch.arange(convolution.width)
        places = ends.unsqueeze(2).expand(-1, -1, convolution.channels)
        exchange.after[convolution.part] = joined.gather(1, places).transpose(1, 2)
        rows = self._convolve(joined).flatten(0, 1).unsqueeze(2)
        # Outputs beyond the last step, of a convolution that pads both ends, must be cut off.
        surplus = rows.expand(-1, -1, convolution.surplus) * torch.nan
        return torch.cat([rows, surplus], dim=2) if convolution.surplus else rows

    def _convolve(self, joined: Tensor) -> Tensor:
        """[batch, width + steps, channels] to [batch, steps, out channels].

        ONNX Runtime's Conv adds in an order that depends on the length; a product with constant
        weights does not. With groups that product would be large and mostly zeros.
        """
        module, width = self._convolution[0].module, self._convolution[0].width
        if module.groups > 1:
            y = functional.conv1d(
                joined.transpose(1, 2),
                self.weight,
                self.bias,
                dilation=module.dilation,
                groups=module.groups,
            )
            return y.transpose(1, 2)
        starts = range(0, width + 1, module.dilation[0])
        taps = [joined[:, start : start - width or None] for start in starts]
        y = torch.cat(taps, dim=2) @ self.matrix
        return y if self.bias is None else y + self.bias


def replace_layers(
    module: nn.Module, layers: Sequence[StatefulLayer], exchange: StateExchange
) -> nn.Module:
    """`module` with each of the stateful `layers` replaced wherever it is registered.

    Changes `module` itself, unless it is one of them: use what is returned.
    """
    natives: dict[int, nn.Module] = {
        id(layer.module): NativeLayer(layer, exchange)
        if isinstance(layer, RecurrentLayer)
        else NativeConvolution(layer, exchange)
        for layer in layers
    }
    if id(module) in natives:
        return natives[id(module)]
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in natives:
                parent.register_module(name, natives[id(child)])
    return module
