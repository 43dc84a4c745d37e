"""Lines of text become the inputs of a step, or are refused with what is expected."""

import json

import numpy as np
import pytest

from sluice_cli.rows import CsvRows, JsonRows, RowError
from sluice_protos.contract_pb2 import ModelContract, TensorSpec


def contract(datatype="FP32", shape=()):
    spec = {"datatype": datatype, "shape": shape}
    return ModelContract(
        inputs=[TensorSpec(name="x", **spec)],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=[3])],
    )


@pytest.mark.parametrize("line", ["5", "5,6", "5,6,7,8"])
def test_a_row_has_a_value_for_each_named_column(line):
    rows = CsvRows(contract(), None)
    assert rows.read("time,place,x\n") is None
    with pytest.raises(RowError, match="values; the first line names 3 columns"):
        rows.read(line)
    assert rows.read("5,6,7")[1]["x"] == 7


def test_a_row_without_its_key_is_refused():
    rows = CsvRows(contract(), "device")
    assert rows.read("time,x,device\n") is None
    with pytest.raises(RowError, match="2 values; the first line names 3 columns"):
        rows.read("5,6")
    assert rows.read("5,6,a")[0] == "a"


def test_truths_are_numbers_or_words():
    rows = CsvRows(contract("BOOL", [4]), None)
    for line in ("1,0,true,FALSE\n", "True,false,1,0"):
        _, inputs = rows.read(line)
        assert inputs["x"].dtype == bool
        assert inputs["x"].tolist() == [True, False, True, False]
    with pytest.raises(RowError, match="5, 0, 0, 0 is not x: bool"):
        rows.read("5,0,0,0")


def test_truths_may_have_a_header():
    rows = CsvRows(contract("BOOL", [2]), None)
    assert rows.read("x.1,x.0\n") is None
    assert rows.read("true,0")[1]["x"].tolist() == [False, True]


def test_a_line_that_is_no_csv_is_refused():
    rows = CsvRows(contract(), None)
    with pytest.raises(RowError, match=r"is not CSV .*field limit"):
        rows.read("2" * 200_000)


@pytest.mark.parametrize(
    ("line", "message"),
    [("[" * 100_000, "nested too deeply"), ("9" * 5000, "is not JSON"), ("{", "is not JSON")],
    ids=["deep", "long", "open"],
)
def test_a_line_that_is_no_json_is_refused(line, message):
    with pytest.raises(RowError, match=message):
        JsonRows(contract(), None).read(line)


def test_what_is_written_is_json_even_where_outputs_are_no_numbers():
    outputs = {"y": np.array([0.1, np.nan, np.inf], np.float32)}

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = JsonRows(contract(), None).write("", outputs)
    assert json.loads(line, parse_constant=refuse) == [0.1, None, None]


@pytest.mark.parametrize("kind, key", [(JsonRows, "y"), (CsvRows, "y.1")])
def test_a_key_that_an_output_would_hide_is_refused(kind, key):
    with pytest.raises(RowError, match="is also the name of an output; rename that column"):
        kind(contract(), key)
