"""`sluice export` makes a file from a factory and a checkpoint, or says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sluice_cli.main import make_app
from sluice_model import Model, read_contract
from tests.models import embedding_module, lstm_module


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(lstm_module().state_dict(), "lstm.pt")
    return lambda *arguments: CliRunner().invoke(make_app(), ["export", *arguments])


def test_a_factory_and_a_checkpoint_become_a_file(run):
    result = run(
        *("tests.models:lstm_module", "--checkpoint", "lstm.pt"),
        *("--output", "out/lstm.onnx", "--name", "demo"),
    )
    assert result.exit_code == 0, result.output
    contract = Model.load("out/lstm.onnx").contract
    assert contract.name == "demo"
    for proof in contract.proofs:
        assert proof.name in result.stdout
    assert "sluice serve --model demo=out/lstm.onnx" in result.stdout


def test_arguments_inputs_ranges_and_names_are_passed_on(run):
    Path("mine_for_export.py").write_text(
        "from torch import nn\n"
        "class Codes(nn.Module):\n"
        "    def __init__(self, hidden, kind):\n"
        "        super().__init__()\n"
        "        self.cell = getattr(nn, kind)(4, hidden, batch_first=True)\n"
        "    def forward(self, codes, x):\n"
        "        return self.cell(nn.functional.one_hot(codes, 4) + x)[0]\n"
    )
    result = run(
        *("mine_for_export:Codes", "--arg", "hidden=6", "--arg", "kind=GRU"),
        *("--input", "codes:int64:1,5", "--input", "x:float32:1,5,4"),
        *("--valid", "codes:0:3", "--output-name", "smooth", "-o", "codes.onnx"),
    )
    assert result.exit_code == 0, result.output
    contract = read_contract(Path("codes.onnx"))
    assert [spec.name for spec in contract.inputs] == ["codes", "x"]
    assert (contract.inputs[0].valid.min, contract.inputs[0].valid.max) == (0, 3)
    assert contract.outputs[0].name == "smooth"
    assert contract.name == "codes"
    assert (contract.cells[0].kind, contract.cells[0].hidden_size) == ("GRU", 6)
    assert "no --checkpoint was given" in result.stderr


def test_a_checkpoint_of_another_module_writes_nothing(run):
    torch.save(embedding_module().state_dict(), "other.pt")
    result = run("tests.models:lstm_module", "--checkpoint", "other.pt", "-o", "model.onnx")
    assert result.exit_code == 1
    assert "its weights are not those of Recurrent" in result.stderr
    assert not Path("model.onnx").exists()


def test_an_unreadable_checkpoint_names_the_fix(run):
    Path("broken.pt").write_bytes(b"not weights")
    result = run("tests.models:lstm_module", "--checkpoint", "broken.pt", "-o", "model.onnx")
    assert result.exit_code == 1
    assert "torch.save(module.state_dict(), path)" in result.stderr
    assert result.stdout == ""


def test_what_cannot_be_streamed_is_refused(run):
    result = run(
        "torch.nn:LSTM",
        "--arg",
        "input_size=3",
        "--arg",
        "hidden_size=4",
        "--arg",
        "bidirectional=True",
        "-o",
        "model.onnx",
    )
    assert result.exit_code == 1
    assert "error: lstm is bidirectional" in result.stderr
    assert not Path("model.onnx").exists()


def test_inputs_that_cannot_be_guessed_are_asked_for(run):
    result = run("tests.models:multi_module", "-o", "model.onnx")
    assert result.exit_code == 1
    assert "--input x:float32:2,5,8" in result.stderr


@pytest.mark.parametrize(
    "option, value, hint",
    [
        ("--arg", "hidden", "NAME=VALUE"),
        ("--input", "x", "NAME:TYPE:SHAPE"),
        ("--input", "x:real:1,2,3", "NAME:TYPE:SHAPE"),
        ("--input", "x:float32:1,0,3", "NAME:TYPE:SHAPE"),
        ("--valid", "x:5:1", "NAME:FIRST:LAST"),
        ("--valid", "x:low:high", "NAME:FIRST:LAST"),
    ],
)
def test_an_option_written_wrongly_is_explained(run, option, value, hint):
    result = run("tests.models:lstm_module", "-o", "model.onnx", option, value)
    assert result.exit_code == 2
    assert hint in result.stderr


def test_a_file_that_the_factory_misses_is_named(run):
    Path("reads_for_export.py").write_text("def make():\n    open('vocabulary.txt')\n")
    Path("reads_at_once_for_export.py").write_text("open('vocabulary.txt')\n")
    for target in ("reads_for_export:make", "reads_at_once_for_export:make"):
        result = run(target, "-o", "model.onnx")
        assert result.exit_code == 1
        assert f"error: {target} cannot read what it needs" in result.stderr
        assert "'vocabulary.txt'" in result.stderr
        assert "written" not in result.stderr


def test_a_place_that_cannot_be_written_is_named(run):
    Path("file").write_text("")
    result = run("tests.models:lstm_module", "--checkpoint", "lstm.pt", "-o", "file/model.onnx")
    assert result.exit_code == 1
    assert "error: file/model.onnx: cannot be written" in result.stderr


def test_the_help_teaches_by_example(run):
    result = run("--help")
    assert result.exit_code == 0
    assert "sluice export train:CharacterModel --checkpoint weights.pt" in result.stdout


def test_a_missing_torch_is_one_line_with_the_fix():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.argv = ['sluice', 'export', 'a:b', '-o', 'c.onnx']\n"
        "from sluice_cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: export needs torch: pip install 'sluice-serving[export]'\n"
    assert done.stdout == ""
