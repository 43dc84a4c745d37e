"""Architectures drawn at random, of PyTorch and of ONNX, stream as they compute whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sluice_export import export, export_onnx
from sluice_model import Model, example_inputs
from tests.export.foreign_models import Builder
from tests.export.plain_onnxruntime import run_alone

draw_few = settings(
    deadline=None,
    # The same on every run: what fails on one commit must not be what another one drew.
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    # Each example is an export: to shrink a failing one would take minutes.
    phases=[Phase.explicit, Phase.generate],
)


def assert_streams(path: Path, expected: dict[str, np.ndarray], inputs: dict[str, Any]) -> None:
    """Chunks of many lengths in one run give `expected`; the file alone has the very bits.

    Each tensor [batch, steps, …].
    """
    model = Model.load(path)
    contract = model.contract
    arrays = [inputs[spec.name] for spec in contract.inputs]
    batch, steps = arrays[0].shape[:2]
    state = np.tile(model.initial_state, (batch, 1))
    streamed: list[list[list[np.ndarray]]] = [[] for _ in range(batch)]
    at = np.zeros(batch, int)
    random = np.random.default_rng(0)
    while (at < steps).any():
        rows = np.flatnonzero(at < steps)
        lengths = np.minimum(random.integers(1, 4, len(rows)), steps - at[rows]).astype(np.int32)
        chunk = [np.zeros((len(rows), lengths.max(), *a.shape[2:]), a.dtype) for a in arrays]
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for piece, array in zip(chunk, arrays, strict=True):
                piece[place, :length] = array[row, at[row] : at[row] + length]
        outputs, state[rows] = model.run(chunk, lengths, state[rows])
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            streamed[row].append([array[place, :length] for array in outputs])
        at[rows] += lengths
    for row in range(batch):
        alone = run_alone(path, {name: array[row] for name, array in inputs.items()})
        for place, spec in enumerate(contract.outputs):
            mine = np.concatenate([pieces[place] for pieces in streamed[row]])
            whole = expected[spec.name][row]
            np.testing.assert_allclose(mine, whole, rtol=1e-4, atol=1e-5, strict=True)
            assert np.array_equal(mine, alone[spec.name])


@dataclass(frozen=True)
class Block:
    """One recurrent part of a module: what it is made of and how forward runs it."""

    kind: str  # lstm, gru, rnn, relu
    hidden: int
    depth: int = 1
    has_bias: bool = True
    run: str = "layer"  # layer, loop (of a layer), cell (in a loop)
    projection: int = 0  # of an LSTM layer
    context: int = 0  # steps that a convolution before it looks back to


CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell, "relu": nn.RNNCell}
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "relu": nn.RNN}


class Anything(nn.Module):
    """Some recurrent parts, one behind the other, with something stateless between, and a head."""

    def __init__(self, blocks: list[Block], *, is_batch_first: bool, head: str) -> None:
        super().__init__()
        self.blocks, self.is_batch_first, self.head_kind = blocks, is_batch_first, head
        self.parts, self.norms = nn.ModuleList(), nn.ModuleList()
        self.convolutions = nn.ModuleDict()
        size = 3
        for place, block in enumerate(blocks):
            options: dict[str, Any] = {"bias": block.has_bias}
            if block.kind == "relu":
                options["nonlinearity"] = "relu"
            if block.context:
                self.convolutions[str(place)] = nn.Conv1d(size, size, block.context + 1)
            if block.run == "cell":
                self.parts.append(CELLS[block.kind](size, block.hidden, **options))
            else:
                if block.projection and block.kind == "lstm":
                    options["proj_size"] = block.projection
                options["batch_first"] = is_batch_first
                self.parts.append(
                    LAYERS[block.kind](size, block.hidden, num_layers=block.depth, **options)
                )
            size = options.get("proj_size", block.hidden)
            self.norms.append(nn.LayerNorm(size))
        self.head = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        time = 1 if self.is_batch_first else 0
        for place, (block, part) in enumerate(zip(self.blocks, self.parts, strict=True)):
            if block.context:
                x = self.convolve(x, self.convolutions[str(place)], block.context)
            y = self.run(part, x, block, time)
            x = functional.silu(self.norms[place](y))
        return self.head(x.select(time, -1) if self.head_kind == "last" else x)

    def convolve(self, x: Tensor, convolution: nn.Module, context: int) -> Tensor:
        rows = x.transpose(1, 2) if self.is_batch_first else x.permute(1, 2, 0)
        y = convolution(functional.pad(rows, (context, 0)))
        return y.transpose(1, 2) if self.is_batch_first else y.permute(2, 0, 1)

    def run(self, part: nn.Module, x: Tensor, block: Block, time: int) -> Tensor:
        if block.run == "layer":
            return part(x)[0]
        state: Any = None
        outputs = []
        for row in x.split(1, dim=time):
            if block.run == "loop":
                y, state = part(row, state)
            else:
                state = part(row.squeeze(time), state)
                y = (state[0] if block.kind == "lstm" else state).unsqueeze(time)
            outputs.append(y)
        return torch.cat(outputs, dim=time)


block_strategy = st.integers(2, 9).flatmap(
    lambda hidden: st.builds(
        Block,
        kind=st.sampled_from(["lstm", "gru", "rnn", "relu"]),
        hidden=st.just(hidden),
        depth=st.integers(1, 3),
        has_bias=st.booleans(),
        run=st.sampled_from(["layer", "layer", "loop", "cell"]),
        projection=st.integers(0, hidden - 1),
        context=st.sampled_from([0, 0, 1, 3]),
    )
)


@pytest.mark.timeout(600)
@settings(draw_few, max_examples=2)
# Nearly silent: their states are so small that rounding alone is a large share of them.
@example(blocks=[Block("rnn", 1, 3, has_bias=False)], is_batch_first=False, head="each")
@example(
    blocks=[Block("lstm", 5, 2, projection=3, context=2), Block("gru", 4, run="cell")],
    is_batch_first=False,
    head="last",
)
@example(
    blocks=[Block("lstm", 4, 2, run="loop"), Block("relu", 3, context=3)],
    is_batch_first=True,
    head="each",
)
@given(
    blocks=st.lists(block_strategy, min_size=1, max_size=2),
    is_batch_first=st.booleans(),
    head=st.sampled_from(["each", "last"]),
)
def test_any_module_streams_as_it_computes(tmp_path, blocks, is_batch_first, head):
    torch.manual_seed(0)
    module = Anything(blocks, is_batch_first=is_batch_first, head=head).eval()
    contract = export(module, torch.zeros(1, 1, 3), tmp_path / "model.onnx")
    assert all(proof.passed for proof in contract.proofs)
    x = torch.randn(3, 9, 3)
    steps = range(1, 10) if head == "last" else [9]

    def run(steps: int) -> Tensor:
        begun = x[:, :steps]
        with torch.no_grad():
            return module(begun if is_batch_first else begun.transpose(0, 1))

    if head == "last":
        expected = torch.stack([run(step) for step in steps], dim=1)
    else:
        expected = run(9) if is_batch_first else run(9).transpose(0, 1)
    assert_streams(tmp_path / "model.onnx", {"y": expected.numpy()}, {"x": x.numpy()})


@dataclass(frozen=True)
class Operator:
    """One recurrent operator of a file, and where its state comes from."""

    kind: str  # lstm or gru
    hidden: int
    start: str  # input (and an output gives it back), zeros, constant


operator_strategy = st.builds(
    Operator,
    kind=st.sampled_from(["lstm", "gru"]),
    hidden=st.integers(1, 9),
    start=st.sampled_from(["input", "zeros", "constant"]),
)


def write_anything(path: Path, operators: list[Operator], *, has_time: bool) -> dict[str, Any]:
    """A file x [batch, time, 3] (or [batch, 3]) to y; tells its states: name to output and size."""
    b = Builder(1)
    x = b.add("Transpose", "x", perm=[1, 0, 2]) if has_time else b.add("Unsqueeze", "x", b.put([0]))
    batch = b.add("Shape", "x", start=0, end=1)
    size, states = 3, {}
    inputs: dict[str, Any] = {"x": ["batch", "time", 3] if has_time else ["batch", 3]}
    outputs: dict[str, Any] = {}
    for place, one in enumerate(operators):
        names = [f"h{place}", f"c{place}"][: 2 if one.kind == "lstm" else 1]
        starts = names
        if one.start == "constant":
            shape = b.add("Concat", b.put([1]), batch, b.put([one.hidden]), axis=0)
            starts = [b.add("Expand", b.weight(1, 1, one.hidden), shape) for _ in names]
        make = b.lstm if one.kind == "lstm" else b.gru
        y, *after = make(x, size, one.hidden, *([] if one.start == "zeros" else starts))
        if one.start == "input":
            for name, value in zip(names, after, strict=True):
                b.add("Identity", value, gives=[f"{name}_out"])
                inputs[name] = outputs[f"{name}_out"] = [1, "batch", one.hidden]
                states[name] = (f"{name}_out", one.hidden)
        x, size = b.add("Tanh", b.add("Squeeze", y, b.put([1]))), one.hidden
    y = b.linear(x, size, 2)
    y = b.add("Transpose", y, perm=[1, 0, 2]) if has_time else b.add("Squeeze", y, b.put([0]))
    b.add("Identity", y, gives=["y"])
    outputs["y"] = ["batch", "time", 2] if has_time else ["batch", 2]
    b.save(path, inputs, outputs)
    return states


@pytest.mark.timeout(600)
@settings(draw_few, max_examples=8)
@given(operators=st.lists(operator_strategy, min_size=1, max_size=3), has_time=st.booleans())
def test_any_file_streams_as_it_runs_by_hand(tmp_path, operators, has_time):
    if not has_time:  # else no state would be carried, or not all of it
        operators = [Operator(one.kind, one.hidden, "input") for one in operators]
    source, path = tmp_path / "source.onnx", tmp_path / "model.onnx"
    states = write_anything(source, operators, has_time=has_time)
    contract = export_onnx(source, path)
    assert all(proof.passed for proof in contract.proofs)
    assert len(contract.state) == sum(2 if one.kind == "lstm" else 1 for one in operators)
    (x,) = example_inputs(contract, 3, 9)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    feed = {name: np.zeros((1, 3, size), np.float32) for name, (_, size) in states.items()}
    pieces = []
    for begin in [0] if has_time else range(9):
        feed["x"] = x if has_time else x[:, begin]
        y, *after = session.run(["y", *(output for output, _ in states.values())], feed)
        feed |= dict(zip(states, after, strict=True))
        pieces.append(y if has_time else y[:, np.newaxis])
    assert_streams(path, {"y": np.concatenate(pieces, axis=1)}, {"x": x})
