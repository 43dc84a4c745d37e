"""A module is made from its name, its weights from a checkpoint, its inputs from its layers."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sluice_export import CheckpointError, FactoryError, InputError
from sluice_export.torch.checkpoint import load_checkpoint
from sluice_export.torch.example_inputs import guess_inputs
from sluice_export.torch.factory import make_module
from tests.models import embedding_module, lstm_module, multi_module

SOURCE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, hidden=3):
        super().__init__()
        self.cell = nn.GRU(2, hidden)

def make(**options):
    return Model(**options)

ready = Model(5)

class Holder:
    Inner = Model

def wrong():
    return 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    (folder / "written_by_a_test.py").write_text(SOURCE)
    (folder / "needs_more.py").write_text("import not_installed_anywhere")
    return folder


@pytest.mark.parametrize("name, hidden", [("Model", 4), ("make", 4), ("Holder.Inner", 4)])
def test_a_factory_in_the_current_folder_is_called_with_its_arguments(
    folder, monkeypatch, name, hidden
):
    monkeypatch.chdir(folder)
    module = make_module(f"written_by_a_test:{name}", {"hidden": hidden})
    assert module.cell.hidden_size == hidden


def test_a_module_that_is_there_already_is_taken_as_it_is(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert make_module("written_by_a_test:ready", {}).cell.hidden_size == 5


@pytest.mark.parametrize(
    "target, arguments, message",
    [
        ("written_by_a_test", {}, "names no factory; write package.module:factory"),
        ("not_written:Model", {}, "not_written cannot be imported"),
        ("needs_more:Model", {}, "not_installed_anywhere"),
        ("written_by_a_test:Other", {}, "has no 'Other'"),
        ("written_by_a_test:Model", {"width": 3}, "cannot be called .*--arg name=value"),
        ("written_by_a_test:wrong", {}, "returns a int, not an nn.Module"),
    ],
)
def test_a_factory_that_makes_no_module_is_refused(folder, monkeypatch, target, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(FactoryError, match=message):
        make_module(target, arguments)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "optimizer": {"step": 1}},
        lambda weights: {"model_state_dict": weights},
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        lambda weights: {"state_dict": {f"_orig_mod.{k}": v for k, v in weights.items()}},
    ],
)
def test_weights_are_found_however_a_training_script_keeps_them(tmp_path, wrap):
    trained, fresh = lstm_module(), lstm_module()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    path = tmp_path / "weights.pt"
    torch.save(wrap(trained.state_dict()), path)
    load_checkpoint(fresh, path)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


class RunsCode:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_nothing_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": RunsCode()}, "weights.pt")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        load_checkpoint(lstm_module(), Path("weights.pt"))
    assert not Path("ran").exists()


def broken_checkpoints():
    whole = Path("whole.pt")
    torch.save(lstm_module().state_dict(), whole)
    content = whole.read_bytes()
    return {
        "text": b"not a checkpoint",
        "empty": b"",
        "cut": content[: len(content) // 2],
        "another pickle": pickle.dumps({"cell.weight": [1.0, 2.0]}),
        "zeros": bytes(1000),
    }


def test_a_broken_checkpoint_is_refused_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in broken_checkpoints().items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"torch.save\(module.state_dict\(\), path\)"):
            load_checkpoint(lstm_module(), path)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(lstm_module(), tmp_path / "none.pt")


def test_weights_of_another_module_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(embedding_module().state_dict(), path)
    with pytest.raises(CheckpointError, match=r"are not those of Recurrent.*--arg name=value"):
        load_checkpoint(lstm_module(), path)


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        load_checkpoint(lstm_module(), path)


class ReadsState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(7, 4)
        self.cell = nn.LSTM(4, 4)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self.cell(self.project(x), state)[0]


@pytest.mark.parametrize(
    "module, shape, dtype",
    [
        (lstm_module(), (2, 5, 8), torch.float32),
        (embedding_module(), (2, 5), torch.int64),
        (ReadsState(), (2, 5, 7), torch.float32),
        (ReadsState().double(), (2, 5, 7), torch.float64),
    ],
)
def test_what_a_module_takes_is_guessed_from_its_layers(module, shape, dtype):
    example = guess_inputs(module)
    assert (tuple(example.shape), example.dtype) == (shape, dtype)


def test_two_inputs_are_asked_for():
    with pytest.raises(InputError, match="--input x:float32:2,5,8"):
        guess_inputs(multi_module())
