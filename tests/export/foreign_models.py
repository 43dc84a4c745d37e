"""ONNX files as others make them, with random weights: the shapes of models people use."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Builder:
    """A graph that grows node by node."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)
        self.prefix = ""

    def name(self, what: str) -> str:
        return f"{self.prefix}{what}_{len(self.nodes) + len(self.weights)}"

    def put(self, value: Any, dtype: Any = np.int64) -> str:
        name = self.name("k")
        self.weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def weight(self, *shape: int, scale: float = 0.3) -> str:
        return self.put(scale * self.random.standard_normal(shape), np.float32)

    def add(
        self, operator: str, *inputs: str, gives: list[str] | None = None, **options: Any
    ) -> Any:
        names = gives or [self.name(operator.lower())]
        self.nodes.append(
            helper.make_node(operator, inputs, names, name=f"/{self.name(operator)}", **options)
        )
        return names[0] if len(names) == 1 else names

    def lstm(self, x: str, size: int, hidden: int, h: str = "", c: str = "") -> list[str]:
        """Y, h and c after: Y [steps, 1, batch, hidden]."""
        w, r = self.weight(1, 4 * hidden, size), self.weight(1, 4 * hidden, hidden)
        states = ["", h, c] if h else []
        names = [self.name("y"), self.name("hn"), self.name("cn")]
        return self.add(
            "LSTM", x, w, r, self.weight(1, 8 * hidden), *states, gives=names, hidden_size=hidden
        )

    def gru(self, x: str, size: int, hidden: int, h: str = "") -> list[str]:
        w, r = self.weight(1, 3 * hidden, size), self.weight(1, 3 * hidden, hidden)
        names = [self.name("y"), self.name("hn")]
        bias = self.weight(1, 6 * hidden)
        states = ["", h] if h else []
        return self.add(
            "GRU", x, w, r, bias, *states, gives=names, hidden_size=hidden, linear_before_reset=1
        )

    def linear(self, x: str, size: int, out: int) -> str:
        return self.add("Add", self.add("MatMul", x, self.weight(size, out)), self.weight(out))

    def cut(self, x: str, start: int, stop: int, axis: int) -> str:
        return self.add("Slice", x, self.put([start]), self.put([stop]), self.put([axis]))

    def save(
        self, path: Path, inputs: dict[str, Any], outputs: dict[str, Any], opset: int = 17
    ) -> Path:
        """Write the graph; a tensor is its shape, or (type, shape)."""

        def values(tensors: dict[str, Any]) -> list[onnx.ValueInfoProto]:
            typed = {n: v if isinstance(v, tuple) else (FLOAT, v) for n, v in tensors.items()}
            return [helper.make_tensor_value_info(n, *v) for n, v in typed.items()]

        graph = helper.make_graph(
            self.nodes, "foreign", values(inputs), values(outputs), self.weights
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=9,
            producer_name="somebody",
        )
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString())
        return path


def _voice_branch(seed: int, prefix: str, stride: int) -> onnx.GraphProto:
    """One of the two models in a voice detector: a frame and (h, c) to (probability, states)."""
    b = Builder(seed)
    b.prefix = prefix
    wave = b.add("Unsqueeze", "input", b.put([1]))
    kernel = b.weight(16, 1, 64, scale=0.1)
    x = b.add("Relu", b.add("Conv", wave, kernel, strides=[stride]))
    x = b.add("ReduceMean", x, axes=[2], keepdims=0)
    h, c = (b.cut("state", at, at + 1, 0) for at in (0, 1))
    _, hn, cn = b.lstm(b.add("Unsqueeze", x, b.put([0])), 16, 128, h, c)
    y = b.linear(b.add("Squeeze", hn, b.put([0])), 128, 1)
    results = [b.add("Sigmoid", y), b.add("Concat", hn, cn, axis=0)]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in results]
    return helper.make_graph(b.nodes, prefix, [], outputs, b.weights)


def write_voice_detector(path: Path) -> Path:
    """Like Silero VAD: a frame with its left context, a state [2, B, 128], a scalar rate."""
    b = Builder()
    is_16k = b.add("Equal", "sr", b.put(16000))
    b.nodes.append(
        helper.make_node(
            "If",
            [is_16k],
            ["output", "stateN"],
            name="/If_0",
            then_branch=_voice_branch(1, "a/", 64),
            else_branch=_voice_branch(2, "b/", 32),
        )
    )
    return b.save(
        path,
        {"input": [None, None], "state": [2, None, 128], "sr": (INT64, [])},
        {"output": [None, 1], "stateN": [2, None, 128]},
    )


def write_noise_mask(path: Path) -> Path:
    """Like DTLN's first part: a batch of 1, and a state [1, 2, 128, 2] of two LSTMs."""
    b = Builder(3)
    x = "input_2"
    stacked = []
    for layer, size in enumerate((257, 128)):
        part = b.add("Gather", "input_3", b.put(layer), axis=1)
        h, c = (
            b.add("Unsqueeze", b.add("Gather", part, b.put(at), axis=2), b.put([0]))
            for at in (0, 1)
        )
        y, hn, cn = b.lstm(x, size, 128, h, c)
        x = b.add("Squeeze", y, b.put([1]))
        pair = [
            b.add("Unsqueeze", b.add("Squeeze", v, b.put([0])), b.put([1, 3])) for v in (hn, cn)
        ]
        stacked.append(b.add("Concat", *pair, axis=3))
    b.add("Sigmoid", b.linear(x, 128, 257), gives=["Identity"])
    b.add("Concat", *stacked, axis=1, gives=["Identity_1"])
    return b.save(
        path,
        {"input_2": [1, 1, 257], "input_3": [1, 2, 128, 2]},
        {"Identity": [1, 1, 257], "Identity_1": [1, 2, 128, 2]},
    )


def write_speech_enhancer(path: Path) -> Path:
    """Like GTCRN streaming: a spectrum frame [1, 33, 1, 2] and three caches, a batch of 1."""
    b = Builder(4)
    x = b.add("Transpose", "mix", perm=[0, 3, 2, 1])  # [1, 2, 1, 33]
    x = b.add("Relu", b.add("Conv", x, b.weight(8, 2, 1, 3), pads=[0, 1, 0, 1]))
    caches = []
    for place in (0, 1):  # a convolution over the last frames
        cache = b.add("Gather", "conv_cache", b.put(place), axis=0)  # [1, 8, 2, 33]
        joined = b.add("Concat", cache, x, axis=2)
        x = b.add("Add", x, b.add("Conv", joined, b.weight(8, 8, 3, 3), pads=[0, 1, 0, 1]))
        caches.append(b.add("Unsqueeze", b.cut(joined, 1, 3, 2), b.put([0])))
    b.add("Concat", *caches, axis=0, gives=["conv_cache_out"])
    energy = b.add("ReduceMean", b.add("Mul", x, x), axes=[3], keepdims=0)  # [1, 8, 1]
    weight, tra = b.gru(b.add("Transpose", energy, perm=[2, 0, 1]), 8, 8, "tra_cache")
    b.add("Identity", tra, gives=["tra_cache_out"])
    gate = b.add("Sigmoid", b.add("Squeeze", weight, b.put([1])))  # [1, 1, 8]
    gate = b.add("Unsqueeze", b.add("Transpose", gate, perm=[1, 2, 0]), b.put([3]))
    x = b.add("Mul", x, gate)
    rows = b.add("Reshape", b.add("Transpose", x, perm=[2, 0, 3, 1]), b.put([1, -1, 8]))
    y, inter = b.gru(rows, 8, 8, "inter_cache")  # a row for each frequency
    b.add("Identity", inter, gives=["inter_cache_out"])
    y = b.add("Squeeze", y, b.put([1]))
    y = b.add("Reshape", b.linear(y, 8, 2), b.put([1, 1, 33, 2]))
    b.add("Transpose", y, perm=[0, 2, 1, 3], gives=["enh"])
    states = {"conv_cache": [2, 1, 8, 2, 33], "tra_cache": [1, 1, 8], "inter_cache": [1, 33, 8]}
    return b.save(
        path,
        {"mix": [1, 33, 1, 2], **states},
        {"enh": [1, 33, 1, 2], **{f"{name}_out": shape for name, shape in states.items()}},
    )


def write_stacked_states(path: Path) -> Path:
    """Four states go in one by one, and come out as one stack [4, 1, B, 12]."""
    b = Builder(5)
    x = b.add("Transpose", "features", perm=[1, 0, 2])
    y, h1, c1 = b.lstm(x, 6, 12, "h1", "c1")
    y, h2, c2 = b.lstm(b.add("Squeeze", y, b.put([1])), 12, 12, "h2", "c2")
    y = b.add("Transpose", b.add("Squeeze", y, b.put([1])), perm=[1, 0, 2])
    b.add("Identity", b.linear(y, 12, 3), gives=["scores"])
    b.add(
        "Concat",
        *(b.add("Unsqueeze", s, b.put([0])) for s in (h1, c1, h2, c2)),
        axis=0,
        gives=["states"],
    )
    part = [1, "N", 12]
    return b.save(
        path,
        {"features": ["N", "T", 6], "h1": part, "h2": part, "c1": part, "c2": part},
        {"scores": ["N", "T", 3], "states": [4, 1, "N", 12]},
    )


def write_predictor(path: Path) -> Path:
    """Like an RNN-T predictor: a token [N, 1] and the states of two LSTMs, [2, N, 16]."""
    b = Builder(6)
    x = b.add("Gather", b.weight(40, 8, scale=1), "y")
    x = b.add("Transpose", x, perm=[1, 0, 2])
    finals = []
    for layer, size in enumerate((8, 16)):
        h, c = (b.cut(name, layer, layer + 1, 0) for name in ("h", "c"))
        y, hn, cn = b.lstm(x, size, 16, h, c)
        x = b.add("Squeeze", y, b.put([1]))
        finals.append((hn, cn))
    b.add("Concat", *(hn for hn, _ in finals), axis=0, gives=["next_h"])
    b.add("Concat", *(cn for _, cn in finals), axis=0, gives=["next_c"])
    b.add("Transpose", b.linear(x, 16, 10), perm=[1, 0, 2], gives=["decoder_out"])
    state = [2, "N", 16]
    return b.save(
        path,
        {"y": (INT64, ["N", 1]), "h": state, "c": state},
        {"decoder_out": ["N", 1, 10], "next_h": state, "next_c": state},
    )


def write_hidden_state(path: Path) -> Path:
    """A GRU and an LSTM over a time axis that keep their states to themselves."""
    b = Builder(7)
    x = b.add("Transpose", "x", perm=[1, 0, 2])
    y, _ = b.gru(x, 6, 10)
    batch = b.add("Gather", b.add("Shape", x), b.put([1]))
    zeros = b.add("ConstantOfShape", b.add("Concat", b.put([1]), batch, b.put([8]), axis=0))
    y, _, _ = b.lstm(b.add("Squeeze", y, b.put([1])), 10, 8, zeros, zeros)
    y = b.add("Transpose", b.add("Squeeze", y, b.put([1])), perm=[1, 0, 2])
    b.add("Tanh", y, gives=["y"])
    return b.save(path, {"x": ["batch", "time", 6]}, {"y": ["batch", "time", 8]})


def write_constant_start(path: Path) -> Path:
    """A GRU and an LSTM over a time axis that start from constants, expanded to the batch."""
    b = Builder(10)
    x = b.add("Transpose", "x", perm=[1, 0, 2])
    batch = b.add("Shape", "x", start=0, end=1)
    shape = b.add("Concat", b.put([1]), batch, b.put([10]), axis=0)
    value = numpy_helper.from_array(np.array([0.5], np.float32))
    y, _ = b.gru(x, 6, 10, b.add("ConstantOfShape", shape, value=value))
    shape = b.add("Concat", b.put([1]), batch, b.put([8]), axis=0)
    h, c = (b.add("Expand", b.weight(1, 1, 8, scale=1), shape) for _ in range(2))
    y, _, _ = b.lstm(b.add("Squeeze", y, b.put([1])), 10, 8, h, c)
    y = b.add("Transpose", b.add("Squeeze", y, b.put([1])), perm=[1, 0, 2])
    b.add("Tanh", y, gives=["y"])
    return b.save(path, {"x": ["batch", "time", 6]}, {"y": ["batch", "time", 8]})


def write_batch_first(path: Path) -> Path:
    """An LSTM with layout=1, which few runtimes run: a state [N, 1, 8] goes in and out."""
    b = Builder(11)
    y, hn, cn = b.lstm("x", 6, 8, "h", "c")
    b.nodes[-1].attribute.append(helper.make_attribute("layout", 1))
    b.add("Squeeze", y, b.put([2]), gives=["y"])
    b.add("Identity", hn, gives=["h_out"])
    b.add("Identity", cn, gives=["c_out"])
    states = {name: ["N", 1, 8] for name in ("h", "c", "h_out", "c_out")}
    return b.save(
        path,
        {"x": ["N", "T", 6], "h": states["h"], "c": states["c"]},
        {"y": ["N", "T", 8], "h_out": states["h_out"], "c_out": states["c_out"]},
    )


def write_causal_convolution(path: Path) -> Path:
    """A convolution over time whose last two steps are its state; no recurrent operator."""
    b = Builder(8)
    joined = b.add("Concat", "cache_in", "x", axis=2)
    b.add("Conv", joined, b.weight(5, 4, 3), gives=["y"])
    end = np.iinfo(np.int64).max
    b.add("Slice", joined, b.put([-2]), b.put([end]), b.put([2]), gives=["cache_out"])
    return b.save(
        path,
        {"x": ["batch", 4, "time"], "cache_in": ["batch", 4, 2]},
        {"y": ["batch", 5, "time"], "cache_out": ["batch", 4, 2]},
    )


def write_one_row_only(path: Path) -> Path:
    """A step of a GRU for a batch of 1 that normalises over everything it is given."""
    b = Builder(9)
    y, _ = b.gru("x", 4, 6, "h")
    total = b.add("ReduceSum", y, keepdims=1)
    flat = b.add("Squeeze", b.add("Div", y, b.add("Abs", total)), b.put([1]))
    b.add("Identity", flat, gives=["y"])
    b.nodes[0].output[1] = "h_out"
    return b.save(path, {"x": [1, 1, 4], "h": [1, 1, 6]}, {"y": [1, 1, 6], "h_out": [1, 1, 6]})
