"""What an ONNX file of others does not tell, or cannot do, is refused by name with the way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sluice_export import ExportError, PairingError, ParityError, export_onnx
from sluice_model import Model
from tests.export.foreign_models import (
    Builder,
    write_noise_mask,
    write_predictor,
    write_stacked_states,
    write_voice_detector,
)

Graph = tuple[Builder, dict[str, Any], dict[str, Any]]
SEQUENCE = {"x": ["batch", "time", 4]}
RESULT = {"y": ["batch", "time", 4]}


def gru_over_time(b: Builder, x: str = "x", h: str = "", **options: Any) -> str:
    """A GRU over [batch, time, 4]."""
    turned = b.add("Transpose", x, perm=[1, 0, 2])
    y, _ = b.gru(turned, 4, 4, h)
    return b.add("Transpose", b.add("Squeeze", y, b.put([1])), perm=[1, 0, 2])


def no_state(b: Builder) -> Graph:
    b.add("Tanh", "x", gives=["y"])
    return b, SEQUENCE, RESULT


def two_alike(b: Builder) -> Graph:
    b.add("Add", "a", "b", gives=["c"])
    b.add("Sub", "a", "b", gives=["d"])
    return b, {"a": ["batch", 4], "b": ["batch", 4]}, {"c": ["batch", 4], "d": ["batch", 4]}


def two_named_alike(b: Builder) -> Graph:
    total = b.add("Add", "x", b.add("Add", "h_in", "h0"))
    b.add("Tanh", total, gives=["h_out"])
    b.add("Identity", total, gives=["y"])
    shape = ["batch", 4]
    return b, {"x": ["batch", 4], "h_in": shape, "h0": shape}, {"y": shape, "h_out": shape}


def backwards(b: Builder) -> Graph:
    b.add("Identity", gru_over_time(b), gives=["y"])
    for node in b.nodes:
        if node.op_type == "GRU":
            node.attribute.append(helper.make_attribute("direction", "reverse"))
    return b, SEQUENCE, RESULT


def computed_start(b: Builder) -> Graph:
    first = b.add("Gather", "x", b.put([0]), axis=1)
    b.add("Identity", gru_over_time(b, h=b.add("Transpose", first, perm=[1, 0, 2])), gives=["y"])
    return b, SEQUENCE, RESULT


def start_by_row(b: Builder) -> Graph:
    batch = b.add("Shape", "x", start=0, end=1)
    rows = b.add("Range", b.put(0), b.add("Squeeze", batch), b.put(1))
    rows = b.add("Unsqueeze", b.add("Cast", rows, to=TensorProto.FLOAT), b.put([0, 2]))
    h = b.add("Expand", rows, b.add("Concat", b.put([1]), batch, b.put([4]), axis=0))
    b.add("Identity", gru_over_time(b, h=h), gives=["y"])
    return b, SEQUENCE, RESULT


def one_state_for_two(b: Builder) -> Graph:
    for place in (1, 2):
        y, h = b.gru("x", 4, 4, "state")
        b.add("Identity", h, gives=[f"state_{place}"])
    b.add("Squeeze", y, b.put([1]), gives=["y"])
    shape = [1, "batch", 4]
    outputs = {"y": ["time", "batch", 4], "state_1": shape, "state_2": shape}
    return b, {"x": ["time", "batch", 4], "state": shape}, outputs


def branching(b: Builder) -> Graph:
    branches = []
    for prefix in ("a/", "b/"):
        inner = Builder()
        inner.prefix = prefix
        y = gru_over_time(inner)
        output = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
        branches.append(helper.make_graph(inner.nodes, prefix, [], [output], inner.weights))
    total = b.add("ReduceSum", "x", keepdims=0)
    b.nodes.append(
        helper.make_node(
            "If",
            [b.add("Greater", total, b.put(0, np.float32))],
            ["y"],
            name="/If_0",
            then_branch=branches[0],
            else_branch=branches[1],
        )
    )
    return b, SEQUENCE, RESULT


def growing_cache(b: Builder) -> Graph:
    b.add("Concat", "past_key", "x", axis=1, gives=["present_key"])
    b.add("ReduceMean", "present_key", axes=[1], keepdims=1, gives=["y"])
    past = {"past_key": ["batch", "past", 4], "x": ["batch", 1, 4]}
    return b, past, {"y": ["batch", 1, 4], "present_key": ["batch", "total", 4]}


def counting(b: Builder, kind: int, dtype: Any) -> Graph:
    b.add("Add", "count", b.put([[1]], dtype), gives=["count_out"])
    b.add("Add", "x", b.add("Cast", "count", to=TensorProto.FLOAT), gives=["y"])
    shape = ["batch", 1]
    inputs = {"x": ["batch", 1], "count": (kind, shape)}
    return b, inputs, {"y": shape, "count_out": (kind, shape)}


def wide_integers(b: Builder) -> Graph:
    return counting(b, TensorProto.INT64, np.int64)


def doubles(b: Builder) -> Graph:
    return counting(b, TensorProto.DOUBLE, np.float64)


def no_output_over_time(b: Builder) -> Graph:
    y = gru_over_time(b)
    b.add("Gather", y, b.put(-1), axis=1, gives=["y"])
    return b, SEQUENCE, {"y": ["batch", 4]}


def input_for_all(b: Builder) -> Graph:
    b.add("Mul", gru_over_time(b), "gain", gives=["y"])
    return b, {**SEQUENCE, "gain": [1]}, RESULT


def nameless_axes(b: Builder) -> Graph:
    b.add("Identity", gru_over_time(b), gives=["y"])
    return b, {"x": [None, None, 4]}, {"y": [None, None, 4]}


def loose_integers(b: Builder) -> Graph:
    x = b.add("Unsqueeze", b.add("Cast", "codes", to=TensorProto.FLOAT), b.put([2]))
    wide = b.add("Mul", x, b.weight(4))
    b.add("Identity", gru_over_time(b, wide), gives=["y"])
    return b, {"codes": (TensorProto.INT64, ["batch", "time"])}, RESULT


def input_without_time(b: Builder) -> Graph:
    wide = b.add("Unsqueeze", "gain", b.put([1]))
    b.add("Mul", gru_over_time(b), wide, gives=["y"])
    return b, {**SEQUENCE, "gain": ["batch", 4]}, RESULT


def no_batch_at_all(b: Builder) -> Graph:
    b.add("Add", "x", "h_in", gives=["h_out"])
    b.add("Tanh", "h_out", gives=["y"])
    shape = [3, 4]
    return b, {"x": shape, "h_in": shape}, {"y": shape, "h_out": shape}


def texts(b: Builder) -> Graph:
    y = gru_over_time(b)
    b.add("Identity", y, gives=["y"])
    b.add("Cast", y, to=TensorProto.STRING, gives=["text"])
    return b, SEQUENCE, {**RESULT, "text": (TensorProto.STRING, ["batch", "time", 4])}


def computed_weights(b: Builder) -> Graph:
    b.add("Identity", gru_over_time(b), gives=["y"])
    node = next(node for node in b.nodes if node.op_type == "GRU")
    node.input[1] = b.add("Neg", node.input[1])
    b.nodes.insert(0, b.nodes.pop())
    return b, SEQUENCE, RESULT


def nothing_but_states(b: Builder) -> Graph:
    b.add("Add", "h_in", "h_in", gives=["h_out"])
    return b, {"h_in": ["batch", 4]}, {"h_out": ["batch", 4]}


REFUSED = [
    (input_without_time, "'gain' has no time axis, though others have.*--set"),
    (no_batch_at_all, r"'x' has axes \[3, 4\], none of size 1 that could be its batch axis"),
    (texts, "'text' is of type object, which a stream does not carry"),
    (computed_weights, "GRU '/GRU_.* has computed weights; save the file with constant ones"),
    (nothing_but_states, "each input would be a state .h_in.*--state h_in=h_out"),
    (no_state, "no state was found in the file.*--state input=output"),
    (two_alike, "which of the inputs a, b is the state is unclear.*--state"),
    (two_named_alike, "may come back as h_out: each fits by name; name the pair: --state"),
    (backwards, "GRU '/GRU_.* has direction reverse.*future"),
    (computed_start, "GRU '/GRU_.* starts from a state that is computed from input 'x'"),
    (start_by_row, "GRU '/GRU_.* starts from a state that is not the same for every sequence"),
    (one_state_for_two, "'state' starts the states of several .* as state_1, state_2; give each"),
    (branching, "GRU '/[ab]/GRU.* is inside If '/If_0', whose course depends on the input"),
    (growing_cache, "'past_key' has several axes of any size.*grows with the past"),
    (wide_integers, "'count' is TensorProto.INT64, of which float32 does not hold"),
    (doubles, "'count' is TensorProto.DOUBLE"),
    (no_output_over_time, "'y' has shape .*without a steps axis"),
    (input_for_all, "'gain' has no batch axis.*--set gain="),
    (nameless_axes, r"input 'x' \(\?,\?,4\) are batch and time is unclear.*--input x:batch"),
    (loose_integers, "'codes' has integers .*--valid codes:0:9"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_what_cannot_be_streamed_is_refused_with_the_way_out(
    tmp_path: Path, make: Callable[[Builder], Any], message: str
):
    builder, inputs, outputs = make(Builder())
    source = builder.save(tmp_path / "model.onnx", inputs, outputs)
    with pytest.raises(ExportError, match=message):
        export_onnx(source, tmp_path / "served.onnx")
    assert not (tmp_path / "served.onnx").exists()


OPTIONS = [
    (write_voice_detector, {"fixed": {"rate": 1}}, "--set rate: the file has no such input"),
    (write_voice_detector, {"fixed": {"state": 1}}, "--set state: it has shape"),
    (write_voice_detector, {"axes": {"input": ("batch", 576)}}, "LSTM .* is inside If '/If_0'"),
    (
        write_voice_detector,
        {"fixed": {"sr": 16000}, "axes": {"input": ("batch", 9)}},
        "does not run with .*--input",
    ),
    (write_predictor, {"states": {"h": "nothing"}}, "--state h=nothing: the file's inputs are"),
    (write_predictor, {"states": {"h": "next_c"}}, "--state h=next_c: the graph says otherwise"),
    (write_predictor, {"axes": {"z": ("batch",)}}, r"--input names \['z'\]"),
    (write_predictor, {"axes": {"y": ("batch",)}}, "--input y: it has 2 axes, not 1"),
    (write_predictor, {"valid": {"z": (0, 1)}}, r"--valid names \['z'\]"),
]


@pytest.mark.parametrize(
    "write, options, message", OPTIONS, ids=lambda v: getattr(v, "__name__", str(v)[:40])
)
def test_an_option_that_the_file_contradicts_is_refused(tmp_path, write, options, message):
    source = write(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=message):
        export_onnx(source, tmp_path / "served.onnx", **options)
    assert not (tmp_path / "served.onnx").exists()


def test_a_stack_whose_order_cannot_be_told_is_asked_for(tmp_path):
    proto = onnx.load(write_stacked_states(tmp_path / "model.onnx"))
    stack = next(node for node in proto.graph.node if node.output[0] == "states")
    stack.output[0] = "stacked"
    proto.graph.node.append(helper.make_node("Slice", ["stacked", "at", "to"], ["states"]))
    for name, value in (("at", 0), ("to", 4)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    onnx.save(proto, tmp_path / "sliced.onnx")
    with pytest.raises(PairingError, match=r"in an unknown order; name it.*'h1=states\[0\]'"):
        export_onnx(tmp_path / "sliced.onnx", tmp_path / "served.onnx")
    states = {name: f"states[{place}]" for place, name in enumerate(("h1", "c1", "h2", "c2"))}
    contract = export_onnx(tmp_path / "sliced.onnx", tmp_path / "served.onnx", states=states)
    assert contract.state_size == 48


@pytest.mark.parametrize(
    "is_told, message",
    [
        (True, "'all' joins states along their batch axis; give each its own output"),
        (False, "the shape of output 'all' is unknown; save the file with shapes"),
    ],
)
def test_a_stack_that_cannot_be_taken_apart_is_refused(tmp_path, is_told, message):
    b = Builder()
    total = b.add("Add", "a", "x")
    b.add("Add", total, "b", gives=["y"])
    b.add("Concat", total, "y", axis=0, gives=["all"])
    row = ["batch", 4]
    source = b.save(
        tmp_path / "model.onnx", {"x": row, "a": row, "b": row}, {"y": row, "all": ["rows", 4]}
    )
    if not is_told:
        proto = onnx.load(source)
        proto.graph.output[1].type.tensor_type.ClearField("shape")
        source.write_bytes(proto.SerializeToString())
    states = {"a": "all[0]", "b": "all[1]"}
    with pytest.raises(ExportError, match=message):
        export_onnx(source, tmp_path / "served.onnx", states=states)


def test_an_opset_too_old_is_named_with_the_converter(tmp_path):
    proto = onnx.load(write_noise_mask(tmp_path / "model.onnx"))
    proto.opset_import[0].version = 9
    onnx.save(proto, tmp_path / "old.onnx")
    with pytest.raises(ExportError, match=r"of opset 9, at least 10.*version_converter"):
        export_onnx(tmp_path / "old.onnx", tmp_path / "served.onnx")


@pytest.mark.parametrize(
    "location, message",
    [
        ("weights.bin", "its weights in 'weights.bin' cannot be read .*; put that file beside it"),
        ("../weights.bin", r"keeps weights in '../weights.bin', outside its own folder"),
        ("/etc/hostname", "keeps weights in '/etc/hostname', outside its own folder"),
    ],
)
def test_weights_that_are_not_beside_the_file_are_refused(tmp_path, location, message):
    folder = tmp_path / "model"
    folder.mkdir()
    proto = onnx.load(write_noise_mask(folder / "model.onnx"))
    onnx.external_data_helper.convert_model_to_external_data(
        proto, location="weights.bin", size_threshold=16
    )
    onnx.save(proto, folder / "split.onnx")
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    split = onnx.load(folder / "split.onnx", load_external_data=False)
    for tensor in split.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (folder / "split.onnx").write_bytes(split.SerializeToString())
    with pytest.raises(ExportError, match=message):
        export_onnx(folder / "split.onnx", folder / "served.onnx")
    assert not (folder / "served.onnx").exists()


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_what_is_no_onnx_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"model.onnx: (is not an ONNX file|cannot be read)"):
        export_onnx(tmp_path / "model.onnx", tmp_path / "served.onnx")


def test_a_default_of_a_state_is_what_sequences_start_from(tmp_path):
    b = Builder()
    b.add("Add", "x", "total", gives=["total_out"])
    b.add("Mul", "total_out", b.put([2], np.float32), gives=["y"])
    b.weights.append(onnx.numpy_helper.from_array(np.array([[3]], np.float32), "total"))
    shape = ["batch", 1]
    source = b.save(
        tmp_path / "model.onnx", {"x": shape, "total": [1, 1]}, {"y": shape, "total_out": shape}
    )
    states = {"total": "total_out"}
    with pytest.raises(ExportError, match=r"'total' has no batch axis.*--input total:batch"):
        export_onnx(source, tmp_path / "served.onnx", states=states)
    axes = {"total": ("batch", 1)}
    export_onnx(source, tmp_path / "served.onnx", states=states, axes=axes)
    model = Model.load(tmp_path / "served.onnx")
    assert model.initial_state.tolist() == [3]
    outputs, _ = model.run([np.ones((1, 2, 1), np.float32)], None, model.initial_state[np.newaxis])
    assert outputs[0].reshape(-1).tolist() == [8, 10]


def reads_the_whole(b: Builder) -> Graph:
    y = gru_over_time(b)
    b.add("Sub", y, b.add("ReduceMean", y, axes=[1], keepdims=1), gives=["y"])
    return b, SEQUENCE, RESULT


def mixes_rows(b: Builder) -> Graph:
    total = b.add("Add", "x", "h_in")
    b.add("Tanh", total, gives=["h_out"])
    b.add("Sub", total, b.add("ReduceMean", total, axes=[0], keepdims=1), gives=["y"])
    shape = ["batch", 4]
    return b, {"x": shape, "h_in": shape}, {"y": shape, "h_out": shape}


@pytest.mark.parametrize(
    "make, proof, node",
    [
        (reads_the_whole, "parity.stepwise", "ReduceMean"),
        (mixes_rows, "parity.whole", "(ReduceMean|Sub)"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_proof_that_fails_names_the_first_node_at_fault(tmp_path, make, proof, node):
    builder, inputs, outputs = make(Builder())
    source = builder.save(tmp_path / "model.onnx", inputs, outputs)
    with pytest.raises(ParityError, match=rf"{proof} failed.*comes from {node} \(node /{node}"):
        export_onnx(source, tmp_path / "served.onnx")
    assert not (tmp_path / "served.onnx").exists()
