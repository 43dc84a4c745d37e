"""A contract travels inside its file, and a file that is not what it says is refused."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sluice_model import (
    METADATA_KEY,
    ContractError,
    NotAModelError,
    compute_digest,
    initial_row,
    read_contract,
    write_contract,
)
from sluice_model.contract import count_parameters
from sluice_protos.contract_pb2 import ModelContract, StatePart, TensorSpec


def edit(path, tmp_path, change):
    """A copy of the file at `path`, after `change(proto)`."""
    proto = onnx.load_model(path)
    change(proto)
    copied = tmp_path / "edited.onnx"
    onnx.save_model(proto, copied)
    return copied


def rewrite(path, tmp_path, change):
    """A copy of the file at `path` whose contract says what `change(contract)` makes of it."""

    def write(proto):
        contract = ModelContract()
        contract.CopyFrom(read_contract(path))
        change(contract)
        write_contract(proto, contract)

    return edit(path, tmp_path, write)


def test_a_written_contract_is_read_back(accumulator_file, tmp_path):
    before = read_contract(accumulator_file)
    path = rewrite(accumulator_file, tmp_path, lambda contract: None)
    assert read_contract(path) == before
    proto = onnx.load_model(path)
    assert [entry.key for entry in proto.metadata_props].count(METADATA_KEY) == 1


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(NotAModelError, match="cannot be read"):
        read_contract(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"text", bytes(200), b"\x80\x02}q\x00."])
def test_bytes_that_are_no_onnx_are_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(NotAModelError, match="is not an ONNX file"):
        read_contract(path)


def test_a_file_cut_short_is_refused(lstm_file, tmp_path):
    path = tmp_path / "model.onnx"
    content = lstm_file.path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises((NotAModelError, ContractError), match="sluice export"):
        read_contract(path)


def test_a_file_without_contract_is_refused_with_the_command_that_makes_one(
    accumulator_file, tmp_path
):
    path = edit(accumulator_file, tmp_path, lambda proto: proto.metadata_props.pop())
    command = f"`sluice export --onnx {path} --output"
    with pytest.raises(ContractError, match=re.escape(f"make one with {command}")):
        read_contract(path)


def test_weights_in_other_files_are_refused(tmp_path, lstm_file):
    proto = onnx.load_model(lstm_file.path)
    path = tmp_path / "model.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, size_threshold=0)
    with pytest.raises(NotAModelError, match="save it as one file"):
        read_contract(path)


def external_tensor():
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="beside.bin")
    return tensor


def in_a_branch(proto):
    result = helper.make_tensor_value_info("weight", TensorProto.FLOAT, [1])
    branch = helper.make_graph([], "branch", [], [result], [external_tensor()])
    choice = helper.make_node("If", ["is_so"], ["z"], then_branch=branch, else_branch=branch)
    proto.graph.node.append(choice)


def in_a_constant(proto):
    proto.graph.node.append(helper.make_node("Constant", [], ["z"], value=external_tensor()))


def in_a_sparse_tensor(proto):
    proto.graph.sparse_initializer.add(values=external_tensor())


def in_a_function(proto):
    constant = helper.make_node("Constant", [], ["z"], value=external_tensor())
    proto.functions.append(helper.make_function("own", "Weight", [], ["z"], [constant], []))


@pytest.mark.parametrize("place", [in_a_branch, in_a_constant, in_a_sparse_tensor, in_a_function])
def test_weights_in_other_files_are_refused_wherever_they_are_named(
    accumulator_file, tmp_path, place
):
    proto = onnx.load_model(accumulator_file)
    contract = read_contract(accumulator_file)
    place(proto)
    write_contract(proto, contract)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(NotAModelError, match="save it as one file"):
        read_contract(path)


def test_a_changed_weight_is_noticed(lstm_file, tmp_path):
    def change(proto):
        tensor = next(t for t in proto.graph.initializer if t.name.endswith("head.bias"))
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[0] += 1
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    with pytest.raises(ContractError, match="changed after the export"):
        read_contract(edit(lstm_file.path, tmp_path, change))


def test_a_changed_attribute_is_noticed(gru_file, tmp_path):
    def change(proto):
        node = next(node for node in proto.graph.node if node.op_type == "GRU")
        next(a for a in node.attribute if a.name == "linear_before_reset").i = 0

    with pytest.raises(ContractError, match="changed after the export"):
        read_contract(edit(gru_file.path, tmp_path, change))


def test_notes_do_not_count_in_the_digest(lstm_file, tmp_path):
    def change(proto):
        proto.doc_string = proto.graph.doc_string = proto.graph.node[0].doc_string = "a note"
        proto.producer_name = "someone else"
        proto.metadata_props.add(key="author", value="someone")
        proto.graph.node[0].metadata_props.add(key="line", value="12")

    path = edit(lstm_file.path, tmp_path, change)
    assert read_contract(path) == read_contract(lstm_file.path)
    assert compute_digest(onnx.load_model(path)) == read_contract(path).digest


def test_a_contract_of_another_schema_is_refused(accumulator_file, tmp_path):
    def change(proto):
        entry = proto.metadata_props[0]
        entry.value = entry.value.replace('"schema_version": 1', '"schema_version": 2')

    with pytest.raises(ContractError, match="schema version 2, this Sluice reads version 1"):
        read_contract(edit(accumulator_file, tmp_path, change))


def test_a_contract_that_is_no_contract_is_refused(accumulator_file, tmp_path):
    def change(proto):
        proto.metadata_props[0].value = "{"

    with pytest.raises(ContractError, match="cannot be read"):
        read_contract(edit(accumulator_file, tmp_path, change))


UNTRUE = {
    "names another input": lambda c: setattr(c.inputs[0], "name", "z"),
    "names another output": lambda c: setattr(c.outputs[0], "name", "z"),
    "gives another datatype": lambda c: setattr(c.inputs[0], "datatype", "FP64"),
    "gives an unknown datatype": lambda c: setattr(c.inputs[0], "datatype", "REAL"),
    "gives another shape": lambda c: c.outputs[0].shape.append(2),
    "gives one axis twice": lambda c: setattr(c.inputs[0], "time_axis", 0),
    "gives an axis beyond": lambda c: setattr(c.inputs[0], "time_axis", 3),
    "leaves a gap in the state": lambda c: setattr(c.state[0], "offset", 1),
    "has too much state": lambda c: c.state.append(StatePart(name="more", offset=1, shape=[1])),
    "starts with too many values": lambda c: c.state[0].initial.extend([0, 0]),
    "has no inputs": lambda c: c.ClearField("inputs"),
    "has no outputs": lambda c: c.ClearField("outputs"),
    "has no smallest batch": lambda c: setattr(c, "batch_min", 0),
    "has no smallest length": lambda c: setattr(c, "length_min", 0),
    "has no state input": lambda c: setattr(c, "state_input", ""),
    "pads beyond its largest batch": lambda c: c.MergeFrom(ModelContract(batch_min=3, batch_max=2)),
    "pads steps without time axis": lambda c: c.MergeFrom(
        ModelContract(is_one_step=True, length_min=2)
    ),
    "denies its time axis": lambda c: setattr(c, "is_one_step", True),
    "has more state than the graph": lambda c: c.MergeFrom(state(size=2**31 - 1)),
    "has more state than numbers can tell": lambda c: c.MergeFrom(state(2**31, 2**31, 4, size=0)),
    "starts with no number": lambda c: c.state[0].initial.append(float("nan")),
    "has a state without output": lambda c: setattr(c, "state_output", ""),
    "takes another output for the state": lambda c: setattr(c, "state_output", "y"),
    "takes an input for the lengths": lambda c: c.MergeFrom(
        ModelContract(lengths_input="state", state_input="lengths")
    ),
    "pads to a huge batch": lambda c: setattr(c, "batch_min", 2**31 - 1),
    "pads to a huge length": lambda c: setattr(c, "length_min", 65),
    "names an input twice": lambda c: c.inputs.append(c.inputs[0]),
    "names an output twice": lambda c: c.outputs.append(c.outputs[0]),
    "limits floats": lambda c: c.inputs[0].valid.SetInParent(),
}


def state(*shape, size):
    """A further part of `shape`, by default so many floats that all are `size`."""
    part = StatePart(name="more", offset=1, shape=shape or [size - 1])
    return ModelContract(state=[part], state_size=size)


@pytest.mark.parametrize("change", UNTRUE.values(), ids=UNTRUE)
def test_a_contract_that_is_not_the_graphs_is_never_written(accumulator_file, tmp_path, change):
    with pytest.raises(ContractError, match="the contract"):
        rewrite(accumulator_file, tmp_path, change)


@pytest.mark.parametrize("first, last", [(5, 1), (-1, 5), (256, 300)])
def test_values_that_an_input_cannot_have_are_not_valid(first, last):
    values = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, ["batch", "steps", 1])
        for name in "xy"
    ]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:]
    )
    spec = {"datatype": "UINT8", "shape": [1], "batch_axis": 0, "time_axis": 1}
    contract = ModelContract(
        inputs=[TensorSpec(name="x", **spec)],
        outputs=[TensorSpec(name="y", **spec)],
        batch_min=1,
        length_min=1,
    )
    write_contract(helper.make_model(graph), contract)
    contract.inputs[0].valid.min, contract.inputs[0].valid.max = first, last
    with pytest.raises(ContractError, match=f"no valid values for 'x': {first} to {last}"):
        write_contract(helper.make_model(graph), contract)


def test_an_axis_of_no_fixed_size_is_refused(accumulator_file, tmp_path):
    def change(proto):
        for value in (proto.graph.input[0], proto.graph.output[0]):
            value.type.tensor_type.shape.dim[2].dim_param = "features"
        contract = read_contract(accumulator_file)
        for spec in (contract.inputs[0], contract.outputs[0]):
            spec.shape[:] = [0]
        write_contract(proto, contract)

    with pytest.raises(ContractError, match="no fixed size"):
        edit(accumulator_file, tmp_path, change)


def test_the_initial_row_has_each_part_in_its_place():
    contract = ModelContract(
        state_size=5,
        state=[
            StatePart(name="a", offset=0, shape=[2]),
            StatePart(name="b", offset=2, shape=[3], initial=[1, 2, 3]),
        ],
    )
    assert initial_row(contract).tolist() == [0, 0, 1, 2, 3]
    assert initial_row(contract).dtype == np.float32


def test_parameters_are_counted_without_shapes_and_indices():
    graph = helper.make_graph(
        [],
        "weights",
        [],
        [],
        [
            onnx.numpy_helper.from_array(np.zeros((3, 4), np.float32), "weight"),
            onnx.numpy_helper.from_array(np.zeros(4, np.float32), "bias"),
            helper.make_tensor("axis", TensorProto.INT64, [2], [0, 1]),
        ],
    )
    assert count_parameters(helper.make_model(graph)) == 16
