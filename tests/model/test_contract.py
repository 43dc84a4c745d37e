"""A contract travels inside its file, and a file that is not what it says is refused."""

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
from sluice_protos.contract_pb2 import ModelContract, StatePart


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
    with pytest.raises(ContractError, match=r"no Sluice contract; make one with `sluice export"):
        read_contract(path)


def test_weights_in_other_files_are_refused(tmp_path, lstm_file):
    proto = onnx.load_model(lstm_file.path)
    path = tmp_path / "model.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, size_threshold=0)
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
}


@pytest.mark.parametrize("change", UNTRUE.values(), ids=UNTRUE)
def test_a_contract_that_is_not_the_graphs_is_never_written(accumulator_file, tmp_path, change):
    with pytest.raises(ContractError, match="the contract"):
        rewrite(accumulator_file, tmp_path, change)


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
