"""nn.LSTM, nn.GRU and nn.RNN as the native ONNX operators, their state held by the caller."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from sluice_export.errors import BidirectionalError, LayerError


@dataclass(frozen=True)
class CellKind:
    """How PyTorch and ONNX each hold one kind of cell.

    Source: the LSTM, GRU and RNN operators of ONNX opset 14, and the formulas
    in the documentation of nn.LSTM, nn.GRU and nn.RNN.
    """

    name: str
    operator: str
    states: tuple[str, ...]
    # The gates in ONNX's order, and where PyTorch's order has each of them.
    gates: tuple[str, ...]
    order: tuple[int, ...]
    attributes: dict[str, int | Sequence[str]] = field(default_factory=dict)


LSTM: Final = CellKind("LSTM", "LSTM", ("h", "c"), ("i", "o", "f", "c"), (0, 3, 1, 2))
# PyTorch multiplies by the reset gate after the recurrent bias has been added.
GRU: Final = CellKind("GRU", "GRU", ("h",), ("z", "r", "h"), (1, 0, 2), {"linear_before_reset": 1})
RNN_TANH: Final = CellKind("RNN_TANH", "RNN", ("h",), ("i",), (0,), {"activations": ["Tanh"]})
RNN_RELU: Final = CellKind("RNN_RELU", "RNN", ("h",), ("i",), (0,), {"activations": ["Relu"]})

_KINDS: Final = {kind.name: kind for kind in (LSTM, GRU, RNN_TANH, RNN_RELU)}


@dataclass(frozen=True)
class RecurrentLayer:
    """One nn.LSTM, nn.GRU or nn.RNN of a module, which may be several layers deep."""

    path: str  # where it sits in the module; "" where it is the module
    module: nn.RNNBase
    kind: CellKind

    @property
    def name(self) -> str:
        """What contracts and messages call it."""
        return self.path or self.kind.operator.lower()

    @property
    def parts(self) -> list[str]:
        """The names of its state parts in packed order; each is [hidden_size]."""
        return [
            part_name(self.name, state, depth)
            for depth in range(self.module.num_layers)
            for state in self.kind.states
        ]


def part_name(layer: str, state: str, depth: int) -> str:
    """What a part of the packed state is called, such as `encoder.lstm.h.0`."""
    return f"{layer}.{state}.{depth}"


def find_layers(module: nn.Module) -> list[RecurrentLayer]:
    """The recurrent layers of `module`, in the order in which it registers them.

    Raises BidirectionalError or LayerError for what cannot be streamed.
    """
    layers = []
    for path, child in module.named_modules():
        if isinstance(child, nn.RNNCellBase):
            whole = type(child).__name__.removesuffix("Cell")
            raise LayerError(
                f"{path or 'the module'} is an nn.{type(child).__name__}, whose loop over time "
                f"cannot be exported; use nn.{whole} over the whole sequence (same weights: "
                f"weight_ih becomes weight_ih_l0)"
            )
        if not isinstance(child, nn.RNNBase):
            continue
        layer = RecurrentLayer(path, child, _KINDS[child.mode])
        if child.bidirectional:
            raise BidirectionalError(
                f"{layer.name} is bidirectional: each of its outputs needs the whole future of "
                "the sequence, so it cannot run as the sequence arrives; "
                "train it with bidirectional=False"
            )
        if child.proj_size:
            raise LayerError(
                f"{layer.name} has proj_size={child.proj_size}, which ONNX's LSTM does not have; "
                "train it without proj_size (an nn.Linear after the layer may make its output "
                "smaller)"
            )
        layers.append(layer)
    return layers


def reorder_gates(weight: Tensor, kind: CellKind) -> Tensor:
    """A weight or bias of PyTorch, [gates × hidden, …], with its gates in ONNX's order."""
    blocks = weight.chunk(len(kind.gates))
    return torch.cat([blocks[place] for place in kind.order])


class Carry:
    """What one run of a traced module hands from the caller to its layers and back."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.lengths = torch.empty(0)
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}


class NativeLayer(nn.Module):
    """A recurrent layer as ONNX operators, which take their state from a Carry and leave it there.

    Called as the layer it stands for. A state that the module passes is left
    alone: it can only be the one the caller carries, or the initial one.
    """

    def __init__(self, layer: RecurrentLayer, carry: Carry) -> None:
        """Take the weights of `layer`; meet the caller in `carry`."""
        super().__init__()
        self._name = layer.name
        self._kind = layer.kind
        self._carry = [carry]  # in a list: shared, not copied, when the module is
        original = layer.module
        # What modules read off their layers to make a zero state.
        self.mode = original.mode
        self.input_size = original.input_size
        self.hidden_size = original.hidden_size
        self.num_layers = original.num_layers
        self.bias = original.bias
        self.batch_first = original.batch_first
        self.dropout = original.dropout
        self.bidirectional = False
        self.proj_size = 0
        for depth in range(original.num_layers):
            self._take_weights(original, depth)

    def _take_weights(self, original: nn.RNNBase, depth: int) -> None:
        """Keep layer `depth`'s weights as ONNX has them: W, R and B with a direction axis."""

        def reordered(name: str) -> Tensor:
            return reorder_gates(getattr(original, f"{name}_l{depth}").detach().float(), self._kind)

        def keep(name: str, value: Tensor) -> None:
            parameter = nn.Parameter(value.unsqueeze(0).contiguous(), requires_grad=False)
            self.register_parameter(f"{name}{depth}", parameter)

        keep("w", reordered("weight_ih"))
        keep("r", reordered("weight_hh"))
        if original.bias:
            keep("b", torch.cat([reordered("bias_ih"), reordered("bias_hh")]))

    def flatten_parameters(self) -> None:
        """Do nothing: kept because modules call it on their layers."""

    def forward(
        self, sequence: Tensor, state: object = None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """As nn.LSTM, nn.GRU and nn.RNN: [batch, steps, features] or [steps, batch, features]."""
        if self.batch_first:
            sequence = sequence.transpose(0, 1)
        finals: list[list[Tensor]] = []
        for depth in range(self.num_layers):
            sequence, final = self._run_operator(sequence, depth)
            finals.append(final)
        if self.batch_first:
            sequence = sequence.transpose(0, 1)
        stacked = tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))
        return sequence, stacked if len(stacked) > 1 else stacked[0]

    def _run_operator(self, sequence: Tensor, depth: int) -> tuple[Tensor, list[Tensor]]:
        """Layer `depth`: [steps, batch, in] to [steps, batch, hidden], and each final state."""
        carry = self._carry[0]
        names = [part_name(self._name, state, depth) for state in self._kind.states]
        steps, batch, _ = sequence.shape
        hidden = self.hidden_size
        results = torch.onnx.ops.symbolic_multi_out(
            self._kind.operator,
            [
                sequence,
                getattr(self, f"w{depth}"),
                getattr(self, f"r{depth}"),
                getattr(self, f"b{depth}") if self.bias else None,
                carry.lengths,
                *(carry.before[name].unsqueeze(0) for name in names),
            ],
            {"hidden_size": hidden, **self._kind.attributes},
            dtypes=[torch.float32] * (1 + len(names)),
            shapes=[[steps, 1, batch, hidden], *([1, batch, hidden] for _ in names)],
        )
        final = [tensor.squeeze(0) for tensor in results[1:]]
        carry.after.update(zip(names, final, strict=True))
        return results[0].squeeze(1), final


def swap_layers(module: nn.Module, layers: Sequence[RecurrentLayer], carry: Carry) -> nn.Module:
    """`module` with a NativeLayer in the place of each of `layers`, wherever it is registered.

    Changes `module` itself, except where it is a layer: use what is returned.
    """
    natives = {id(layer.module): NativeLayer(layer, carry) for layer in layers}
    if id(module) in natives:
        return natives[id(module)]
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in natives:
                parent.register_module(name, natives[id(child)])
    return module
