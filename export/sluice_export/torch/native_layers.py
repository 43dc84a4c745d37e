"""Stands in for what carries state while a module is traced: native operators, state outside."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from sluice_export.torch.convolutions import CausalConvolution
from sluice_export.torch.layers import RecurrentLayer, reorder_gates


@dataclass
class Carry:
    """What one run of a traced module hands from the caller to its layers and back."""

    lengths: Tensor = field(default_factory=lambda: torch.empty(0))
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    # Where the module is called as with one step of each of batch × steps sequences: both.
    folded: tuple[int, int] | None = None

    def unfold(self, rows: Tensor) -> Tensor:
        """[batch × steps, …] as [batch, steps, …]."""
        assert self.folded is not None
        return rows.reshape(*self.folded, *rows.shape[1:])


class NativeLayer(nn.Module):
    """A recurrent layer or cell as ONNX operators, which take their state from a Carry.

    Called as what it stands for. A state that the module passes is left alone: it
    can only be the one the caller carries, or the initial one.
    """

    def __init__(self, layer: RecurrentLayer, carry: Carry) -> None:
        """Take the weights of `layer`; meet the caller in `carry`."""
        super().__init__()
        self._layer = [layer]  # in lists: shared, not copied, when the module is
        self._carry = [carry]
        self._calls = 0
        original = layer.module
        self._is_cell = isinstance(original, nn.RNNCellBase)
        # What modules read off their layers to make a zero state.
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
            # ONNX's LSTM projects nothing: the projection of h goes into what h is multiplied
            # with, and stays behind the operator for what h is read for.
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
        """As what it stands for: [batch, steps, features], [steps, batch, features] or a row."""
        layer, carry = self._layer[0], self._carry[0]
        call, self._calls = self._calls, (self._calls + 1) % layer.calls
        sequence = self._as_sequence(input)
        states: list[tuple[Tensor, ...]] = []
        for depth in range(layer.depth):
            sequence, final = self._run_operator(sequence, call, depth)
            states.append(final if carry.folded is None else _every_step(sequence, len(final)))
        stacked = tuple(torch.stack(tensors) for tensors in zip(*states, strict=True))
        if self._is_cell:
            return stacked[0][0] if len(stacked) == 1 else tuple(part[0] for part in stacked)
        y = sequence if carry.folded is None else _fold(sequence).unsqueeze(0)
        y = y.transpose(0, 1) if self.batch_first else y
        return y, stacked if len(stacked) > 1 else stacked[0]

    def _as_sequence(self, given: Tensor) -> Tensor:
        """What the module gives its layer as [steps, batch, features]."""
        if not self._is_cell and self.batch_first:
            given = given.transpose(0, 1)
        if self._carry[0].folded is None:
            return given
        rows = given if self._is_cell else given.squeeze(0)
        return self._carry[0].unfold(rows).transpose(0, 1)

    def _run_operator(
        self, sequence: Tensor, call: int, depth: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Layer `depth`: [steps, batch, in] to [steps, batch, out], and each final state."""
        layer, carry = self._layer[0], self._carry[0]
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
                carry.lengths,
                *(carry.before[name].unsqueeze(0) for name in names),
            ],
            {"hidden_size": hidden, **layer.kind.attributes},
            dtypes=[torch.float32] * (1 + len(names)),
            shapes=[[steps, 1, batch, hidden], *([1, batch, hidden] for _ in names)],
        )
        final = [tensor.squeeze(0) for tensor in results[1:]]
        carry.after.update(zip(names, final, strict=True))
        y = results[0].squeeze(1)
        if self.proj_size:
            projection = getattr(self, f"p{depth}")
            y, final[0] = y @ projection, final[0] @ projection
        return y, tuple(final)


def _fold(sequence: Tensor) -> Tensor:
    """[steps, batch, …] as [batch × steps, …]."""
    return sequence.transpose(0, 1).flatten(0, 1)


def _every_step(sequence: Tensor, states: int) -> tuple[Tensor, ...]:
    """The states after each step, [batch × steps, hidden] each; NaN for c.

    ONNX's LSTM tells h at every step and c only at the last: a module that reads c
    must not be taken for one that hands it on.
    """
    h = _fold(sequence)
    return (h, *(torch.full_like(h, torch.nan) for _ in range(states - 1)))


class NativeConvolution(nn.Module):
    """A causal convolution, its left context taken from a Carry; only ever called folded."""

    def __init__(self, convolution: CausalConvolution, carry: Carry) -> None:
        """Take the weights of `convolution`; meet the caller in `carry`."""
        super().__init__()
        self._convolution = [convolution]
        self._carry = [carry]
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
        """As nn.Conv1d on one step with its padding: [rows, channels, padding + 1]."""
        convolution, carry = self._convolution[0], self._carry[0]
        before = carry.before[convolution.part].transpose(1, 2)
        joined = torch.cat([before, carry.unfold(input[..., -1])], dim=1)
        ends = carry.lengths.long().unsqueeze(1) + torch.arange(convolution.width)
        places = ends.unsqueeze(2).expand(-1, -1, convolution.channels)
        carry.after[convolution.part] = joined.gather(1, places).transpose(1, 2)
        rows = self._convolve(joined).flatten(0, 1).unsqueeze(2)
        # What a convolution that pads both ends gives beyond the last step must be cut off.
        surplus = rows.expand(-1, -1, convolution.surplus) * torch.nan
        return torch.cat([rows, surplus], dim=2) if convolution.surplus else rows

    def _convolve(self, joined: Tensor) -> Tensor:
        """[batch, width + steps, channels] to [batch, steps, out channels].

        ONNX Runtime's Conv adds in an order that depends on how long it is; a product with
        constant weights never does. Only groups would make that one large and mostly zeros.
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


Carrier = RecurrentLayer | CausalConvolution


def swap_carriers(module: nn.Module, carriers: Sequence[Carrier], carry: Carry) -> nn.Module:
    """`module` with a native stand-in for each of `carriers`, wherever it is registered.

    Changes `module` itself, except where it is a carrier: use what is returned.
    """
    natives: dict[int, nn.Module] = {
        id(carrier.module): NativeLayer(carrier, carry)
        if isinstance(carrier, RecurrentLayer)
        else NativeConvolution(carrier, carry)
        for carrier in carriers
    }
    if id(module) in natives:
        return natives[id(module)]
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in natives:
                parent.register_module(name, natives[id(child)])
    return module
