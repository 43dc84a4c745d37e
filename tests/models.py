"""The small models that the tests export, serve and stream, and the arrays to feed them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from sluice_model import write_contract
from sluice_protos.contract_pb2 import ModelContract, StatePart, TensorSpec


@dataclass(frozen=True)
class ExportedModel:
    """An exported file and the module it came from, which is in eval mode."""

    path: Path
    module: nn.Module


class Recurrent(nn.Module):
    """Recurrent layers with a linear head: [batch, steps, 8] to [batch, steps, 4]."""

    def __init__(self, cell: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = cell(8, 16, batch_first=True, **options)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


class Tokens(nn.Module):
    """Next-token scores: int64 [batch, steps] below 32 to [batch, steps, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class TwoInTwoOut(nn.Module):
    """Features and tokens to scores and the choice among them, by an LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.lstm = nn.LSTM(10, 12, batch_first=True)
        self.gru = nn.GRU(12, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([features, self.embedding(tokens)], dim=-1)
        scores = self.head(self.gru(self.lstm(x)[0])[0])
        return scores, scores.argmax(-1)


def lstm_module() -> nn.Module:
    """Two layers of LSTM, 8 to 16, and a head to 4."""
    torch.manual_seed(1)
    return Recurrent(nn.LSTM, num_layers=2).eval()


def gru_module() -> nn.Module:
    """One layer of GRU, 8 to 16, and a head to 4."""
    torch.manual_seed(2)
    return Recurrent(nn.GRU).eval()


def rnn_module() -> nn.Module:
    """One layer of RNN (tanh), 8 to 16, and a head to 4; its smallest exact batch is 2."""
    torch.manual_seed(3)
    return Recurrent(nn.RNN).eval()


def embedding_module() -> nn.Module:
    """Tokens below 32 to the scores of the next one."""
    torch.manual_seed(4)
    return Tokens().eval()


def multi_module() -> nn.Module:
    """Inputs `features` [6] and `tokens` [], outputs `scores` [5] and `choice` []."""
    torch.manual_seed(5)
    return TwoInTwoOut().eval()


def write_accumulator(path: Path) -> None:
    """Write a model whose output is the running sum of its input: x [1] to y [1].

    Its state is that sum, [1]. Every step leaves a trace, so one that is lost,
    doubled or given to another sequence shows; small integers give exact sums.
    """
    cells = [
        helper.make_node("Shape", ["x"], ["steps"], start=1, end=2),
        helper.make_node("Squeeze", ["steps"], ["steps_scalar"]),
        helper.make_node("Range", ["zero", "steps_scalar", "one"], ["positions"]),
        helper.make_node("Cast", ["lengths"], ["lengths_wide"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["lengths_wide", "axis_one"], ["lengths_column"]),
        helper.make_node("Less", ["positions", "lengths_column"], ["counts"]),
        helper.make_node("Unsqueeze", ["counts", "axis_two"], ["counts_wide"]),
        helper.make_node("Where", ["counts_wide", "x", "nothing"], ["masked"]),
        # The state goes in front, so that the order of additions is that of one long run.
        helper.make_node("Unsqueeze", ["state", "axis_one"], ["before"]),
        helper.make_node("Concat", ["before", "masked"], ["addends"], axis=1),
        helper.make_node("CumSum", ["addends", "one"], ["sums"]),
        helper.make_node("Slice", ["sums", "axis_one", "end", "axis_one"], ["y"]),
        helper.make_node("Gather", ["sums", "last"], ["state_out"], axis=1),
    ]
    weights = {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "last": np.array(-1, np.int64),
        "axis_one": np.array([1], np.int64),
        "axis_two": np.array([2], np.int64),
        "end": np.array([np.iinfo(np.int64).max], np.int64),
        "nothing": np.array(0, np.float32),
    }
    model, _ = scalar_model("accumulator", cells, weights)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def scalar_model(
    name: str, nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]]
) -> tuple[onnx.ModelProto, ModelContract]:
    """A graph with its contract: x and y are [batch, steps, 1], the state is [batch, 1].

    `nodes` make "y" and "state_out" of "x", "lengths" and "state".
    """
    rows, states = ["batch", "steps", 1], ["batch", 1]
    graph = helper.make_graph(
        nodes,
        name,
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, rows),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, states),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, rows),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, states),
        ],
        [onnx.numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    spec = {"datatype": "FP32", "shape": [1], "batch_axis": 0, "time_axis": 1}
    contract = ModelContract(
        name=name,
        inputs=[TensorSpec(name="x", **spec)],
        outputs=[TensorSpec(name="y", **spec)],
        state_input="state",
        state_output="state_out",
        lengths_input="lengths",
        state_size=1,
        state=[StatePart(name="sum", shape=[1])],
        batch_min=1,
        length_min=1,
    )
    write_contract(model, contract)
    return model, contract


def write_stateless(path: Path) -> None:
    """Write a model without state or lengths whose output is its input plus one: x [2] to y [2]."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["y"])],
        "stateless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "steps", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "steps", 2])],
        [onnx.numpy_helper.from_array(np.array(1, np.float32), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    spec = {"datatype": "FP32", "shape": [2], "batch_axis": 0, "time_axis": 1}
    contract = ModelContract(
        name="stateless",
        inputs=[TensorSpec(name="x", **spec)],
        outputs=[TensorSpec(name="y", **spec)],
        batch_min=1,
        length_min=1,
    )
    write_contract(model, contract)
    path.write_bytes(model.SerializeToString())


def run_offline(path: Path, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """One whole sequence alone in plain onnxruntime: the outputs, each [steps, …].

    Knows nothing of ours but the names of the graph's tensors; `inputs` [steps, …] each.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {name: array[np.newaxis] for name, array in inputs.items()}
    for tensor in session.get_inputs():
        if tensor.name == "lengths":
            feed["lengths"] = np.array([len(next(iter(inputs.values())))], np.int32)
        elif tensor.name == "state":
            feed["state"] = np.zeros((1, tensor.shape[1]), np.float32)
    names = [tensor.name for tensor in session.get_outputs() if tensor.name != "state_out"]
    return [array[0] for array in session.run(names, feed)]
