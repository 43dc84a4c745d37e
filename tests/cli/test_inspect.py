"""`sluice inspect` shows a contract to people and programs, and refuses what has none."""

import json
import subprocess
import sys

import onnx
import pytest
from google.protobuf import json_format
from rich.console import Console
from typer.testing import CliRunner

from sluice_cli.inspect import show
from sluice_cli.main import make_app
from sluice_model import read_contract
from sluice_protos.contract_pb2 import ModelContract, StatePart


def run(*arguments):
    return CliRunner().invoke(make_app(), ["inspect", *map(str, arguments)], env={"COLUMNS": "120"})


def test_people_see_inputs_outputs_state_cells_and_proofs(multi_file):
    result = run(multi_file.path)
    assert result.exit_code == 0
    contract = read_contract(multi_file.path)
    expected = [
        "multi",
        contract.digest,
        "32 floats (128 bytes) for each live sequence",
        "features",
        "0 to 9",
        "choice",
        "INT64",
        "one value",
        "i o f c",
        "z r h",
        "gru.h.0",
        "24–31",
        *(proof.name for proof in contract.proofs),
        "torch 2",
    ]
    assert [text for text in expected if text not in result.stdout] == []


def test_a_part_of_several_axes_ends_where_the_next_begins():
    parts = [
        StatePart(name="cache", offset=0, shape=[2, 3, 4]),
        StatePart(name="count", offset=24),
        StatePart(name="last", offset=25, shape=[5]),
    ]
    console = Console(record=True, width=120)
    show(console, ModelContract(state_size=30, state=parts), parameters=0, size=0)
    shown = console.export_text()
    assert [place for place in ("0–23", "24–24", "25–29") if place not in shown] == []


def test_the_parameters_shown_are_those_of_the_module(multi_file):
    # ONNX keeps PyTorch's two biases apart, so the counts are equal.
    count = sum(parameter.numel() for parameter in multi_file.module.parameters())
    assert f"{count:,} parameters" in run(multi_file.path).stdout


def test_programs_get_json_that_is_the_contract(multi_file):
    result = run(multi_file.path, "--json")
    assert result.exit_code == 0
    contract = json.loads(result.stdout)
    assert contract["state_size"] == 32
    assert contract["inputs"][0]["batch_axis"] == 0
    assert json_format.ParseDict(contract, ModelContract()) == read_contract(multi_file.path)


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_file_that_is_not_onnx_is_refused(tmp_path, as_json):
    path = tmp_path / "model.onnx"
    path.write_text("hello")
    result = run(path, *as_json)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "is not an ONNX file; `sluice export` writes one" in result.stderr


def test_a_file_without_contract_is_refused_with_the_command_that_makes_one(
    accumulator_file, tmp_path
):
    proto = onnx.load_model(accumulator_file)
    del proto.metadata_props[:]
    path = tmp_path / "bare.onnx"
    onnx.save_model(proto, path)
    result = run(path)
    assert result.exit_code == 1
    assert "has no Sluice contract; make one with `sluice export" in result.stderr


def test_a_file_that_is_not_there_is_refused(tmp_path):
    result = run(tmp_path / "none.onnx")
    assert result.exit_code == 1
    assert "cannot be read" in result.stderr


def test_a_model_made_by_hand_is_shown_too(accumulator_file, stateless_file):
    assert "1 floats (4 bytes)" in run(accumulator_file).stdout
    assert "0 floats (0 bytes)" in run(stateless_file).stdout


def test_a_missing_onnx_is_one_line_with_the_fix():
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "sys.argv = ['sluice', 'inspect', 'model.onnx']\n"
        "from sluice_cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: inspect needs onnx: pip install 'sluice-serving[export]'\n"
