"""`sluice verify` makes proofs again; `sluice export --onnx` makes those of a file of others."""

import copy

import onnx
import pytest
import torch
from typer.testing import CliRunner

from sluice_cli.main import make_app
from sluice_model import read_contract, write_contract
from tests.export.foreign_models import write_predictor, write_voice_detector


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(make_app(), list(arguments), terminal_width=200)


def test_every_proof_is_made_again_and_told(run, lstm_file):
    result = run("verify", str(lstm_file.path))
    assert result.exit_code == 0, result.output
    for proof in read_contract(lstm_file.path).proofs:
        assert proof.name in result.stdout


def test_a_file_is_compared_with_the_module_it_came_from(run, lstm_file):
    torch.save(lstm_file.module.state_dict(), "lstm.pt")
    factory = "tests.models:lstm_module"
    result = run("verify", str(lstm_file.path), "--against", factory, "--checkpoint", "lstm.pt")
    assert result.exit_code == 0, result.output
    assert "PyTorch" in result.stdout


def test_other_weights_than_the_files_are_found_out(run, lstm_file):
    module = copy.deepcopy(lstm_file.module)
    with torch.no_grad():
        module.head.bias[0] += 0.5
    torch.save(module.state_dict(), "other.pt")
    factory = "tests.models:lstm_module"
    result = run("verify", str(lstm_file.path), "--against", factory, "--checkpoint", "other.pt")
    assert result.exit_code == 1
    assert "parity.whole, parity.stepwise, parity.chunked, parity.ragged" in result.output
    assert "held when the file was written and does not here" in result.output


def test_what_the_export_allowed_is_allowed_again(run, lstm_file):
    proto = onnx.load(lstm_file.path)
    contract = read_contract(lstm_file.path)
    for proof in contract.proofs:
        if proof.name.startswith("parity."):
            proof.tolerance = 1e6  # as after export --tolerance
    write_contract(proto, contract)
    onnx.save(proto, "model.onnx")
    module = copy.deepcopy(lstm_file.module)
    with torch.no_grad():
        module.head.bias[0] += 0.5
    torch.save(module.state_dict(), "other.pt")
    factory = "tests.models:lstm_module"
    result = run("verify", "model.onnx", "--against", factory, "--checkpoint", "other.pt")
    assert result.exit_code == 0, result.output


def test_another_model_is_no_reference(run, lstm_file):
    result = run("verify", str(lstm_file.path), "--against", "tests.models:gru_module")
    assert result.exit_code == 1
    assert "not the same model" in result.output


def test_a_proof_that_failed_at_the_export_is_no_alarm(run, lstm_file):
    proto = onnx.load(lstm_file.path)
    contract = read_contract(lstm_file.path)
    for proof in contract.proofs:
        proof.passed = proof.name != "bits.ragged"
    write_contract(proto, contract)
    onnx.save(proto, "model.onnx")
    assert run("verify", "model.onnx").exit_code == 0


def test_bits_that_need_a_larger_batch_here_are_found_out(run, rnn_file):
    proto = onnx.load(rnn_file.path)
    contract = read_contract(rnn_file.path)
    contract.batch_min = 1  # as on a machine where a lone row had the bits of many
    write_contract(proto, contract)
    onnx.save(proto, "model.onnx")
    result = run("verify", "model.onnx")
    assert result.exit_code == 1
    assert "bits.sizes" in result.output.splitlines()[-1]


def test_what_is_no_model_of_ours_is_told_so(run, tmp_path):
    write_predictor(tmp_path / "bare.onnx")
    result = run("verify", "bare.onnx")
    assert result.exit_code == 1
    assert "has no Sluice contract" in result.output


def test_a_checkpoint_without_a_factory_is_explained(run, lstm_file):
    result = run("verify", str(lstm_file.path), "--arg", "hidden=3")
    assert result.exit_code == 2
    assert "need --against" in result.output


def test_a_file_of_others_is_exported_from_the_command_line(run, tmp_path):
    write_voice_detector(tmp_path / "vad.onnx")
    options = ["--set", "sr=16000", "--input", "input:batch,576", "--state", "state=stateN"]
    result = run("export", "--onnx", "vad.onnx", "--output", "voice.onnx", *options)
    assert result.exit_code == 0, result.output
    assert "sluice serve --model voice=voice.onnx" in result.stdout
    assert "no --checkpoint" not in result.output
    contract = read_contract(tmp_path / "voice.onnx")
    assert (contract.is_one_step, contract.state_size) == (True, 256)
    shown = run("inspect", "voice.onnx").stdout
    assert "one step of any rows; a chunk is as many runs" in shown


@pytest.mark.parametrize(
    "arguments, hint",
    [
        ([], "give PACKAGE.MODULE:FACTORY, --onnx FILE"),
        (["a:b", "--onnx", "x.onnx"], "give either PACKAGE.MODULE:FACTORY or --onnx FILE"),
        (["--onnx", "x.onnx", "--set", "sr"], "such as"),
        (["--onnx", "x.onnx", "--set", "sr=fast"], "sr=16000"),
        (["--onnx", "x.onnx", "--state", "h"], "h=h_out"),
        (["--onnx", "x.onnx", "--input", "x:batch,sideways"], "x:batch,time,80"),
        (["a:b", "--set", "sr=1"], "--set"),
    ],
)
def test_an_option_written_wrongly_is_explained(run, arguments, hint):
    result = run("export", *arguments, "--output", "out.onnx")
    assert result.exit_code == 2
    assert hint in result.output
