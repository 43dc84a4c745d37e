"""Finds the recurrent layers and cells of a module, and reorders their weights for ONNX."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    # The gates in ONNX's order, and the place of each in PyTorch's order.
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
    """An nn.LSTM, nn.GRU or nn.RNN of a module, which may be several layers deep, or a cell."""

    path: str  # where it sits in the module; "" where it is the module
    module: nn.RNNBase | nn.RNNCellBase
    kind: CellKind
    # How often forward runs it over the sequence; each call has a state of its own.
    calls: int = 1

    @property
    def name(self) -> str:
        """What contracts and messages call it."""
        return self.path or self.kind.operator.lower()

    def within(self, copy: nn.Module) -> "RecurrentLayer":
        """The same layer of a copy of the module that it was found in."""
        module = copy.get_submodule(self.path)
        assert isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        return replace(self, module=module)

    @property
    def is_altered(self) -> bool:
        """Whether its class has a forward of its own, which the graph does not have."""
        return not type(self.module).forward.__module__.startswith("torch.")

    @property
    def depth(self) -> int:
        """How many layers deep it is."""
        return self.module.num_layers if isinstance(self.module, nn.RNNBase) else 1

    @property
    def is_batch_first(self) -> bool:
        """Whether it takes [batch, steps, features], or, as a cell, no steps at all."""
        return not isinstance(self.module, nn.RNNBase) or self.module.batch_first

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Its state parts in packed order, and the shape of each."""
        return {
            self.part(call, state, depth): (self.module.hidden_size,)
            for call in range(self.calls)
            for depth in range(self.depth)
            for state in self.kind.states
        }

    def part(self, call: int, state: str, depth: int) -> str:
        """What a part of the packed state is called, such as `encoder.lstm.h.0`."""
        place = f"[{call}]" if self.calls > 1 else ""
        return f"{self.name}{place}.{state}.{depth}"


def find_layers(module: nn.Module) -> list[RecurrentLayer]:
    """The recurrent layers and cells of `module`, in the order in which it registers them.

    Raises BidirectionalError for what needs the future, LayerError for cells of another kind.
    """
    layers = []
    for path, child in module.named_modules():
        if isinstance(child, nn.RNNBase):
            layer = RecurrentLayer(path, child, _KINDS[child.mode])
            if child.bidirectional:
                raise BidirectionalError(
                    f"{layer.name} is bidirectional: each of its outputs needs the whole future "
                    "of the sequence, so it cannot run as the sequence arrives; "
                    "train it with bidirectional=False"
                )
            layers.append(layer)
        elif isinstance(child, nn.RNNCellBase):
            layers.append(RecurrentLayer(path, child, _kind_of_cell(path, child)))
    return layers


def _kind_of_cell(path: str, cell: nn.RNNCellBase) -> CellKind:
    if isinstance(cell, nn.RNNCell):
        return _KINDS[f"RNN_{cell.nonlinearity.upper()}"]
    if not isinstance(cell, (nn.LSTMCell, nn.GRUCell)):
        raise LayerError(
            f"{path or 'the module'} is a {type(cell).__name__}, a cell of another kind than "
            "nn.LSTMCell, nn.GRUCell and nn.RNNCell, and ONNX has an operator for these alone; "
            "train the model with one of them"
        )
    return LSTM if isinstance(cell, nn.LSTMCell) else GRU


def reorder_gates(weight: Tensor, kind: CellKind) -> Tensor:
    """A weight or bias of PyTorch, [gates × hidden, …], with the gates in ONNX's order."""
    blocks = weight.chunk(len(kind.gates))
    return torch.cat([blocks[place] for place in kind.order])
