"""A recurrent layer is made from its weights alone, or what they lack is named."""

import json
from functools import partial

import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sluice_cli.main import make_app
from sluice_export import BidirectionalError, CheckpointError
from sluice_export.torch.checkpoint import read_weights
from sluice_export.torch.layer_from_weights import make_layer
from sluice_model import read_contract


def write_safetensors(path, weights):
    """As the format's page says: length, header, tensors."""
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in weights.items():
        data = tensor.numpy().tobytes()
        offsets = [len(content), len(content) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        content += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, partial(nn.LSTM, proj_size=3)])
def test_cell_layers_and_sizes_follow_from_the_weights(tmp_path, kind, bias, suffix):
    layer = kind(5, 7, num_layers=2, bias=bias, batch_first=True).eval()
    path = tmp_path / f"weights.{suffix}"
    weights = {f"encoder.{name}": tensor for name, tensor in layer.state_dict().items()}
    write_safetensors(path, weights) if suffix == "safetensors" else torch.save(weights, path)
    made = make_layer(read_weights(path), path, {})
    x = torch.randn(2, 4, 5)
    assert repr(made) == repr(layer)
    assert torch.equal(made(x)[0], layer(x)[0])


def test_a_layer_alone_is_exported_from_the_command_line(tmp_path):
    layer = nn.RNN(3, 6, nonlinearity="relu", batch_first=True).eval()
    torch.save(layer.state_dict(), tmp_path / "rnn.pt")
    command = ["export", "--checkpoint", str(tmp_path / "rnn.pt")]
    command += ["--output", str(tmp_path / "rnn.onnx")]
    result = CliRunner().invoke(make_app(), command)
    assert result.exit_code == 1
    assert "--arg nonlinearity=tanh (or relu)" in result.output
    result = CliRunner().invoke(make_app(), [*command, "--arg", "nonlinearity=relu"])
    assert result.exit_code == 0, result.output
    assert read_contract(tmp_path / "rnn.onnx").cells[0].kind == "RNN_RELU"
    x = torch.randn(1, 9, 3)
    session = onnxruntime.InferenceSession(tmp_path / "rnn.onnx")
    feed = {"x": x.numpy(), "lengths": [9], "state": torch.zeros(1, 6).numpy()}
    y = torch.from_numpy(session.run(["y"], feed)[0])
    torch.testing.assert_close(y, layer(x)[0], rtol=1e-4, atol=1e-5)


REFUSED = [
    (nn.LSTM(2, 3, bidirectional=True), BidirectionalError, "holds a bidirectional layer"),
    (
        nn.Sequential(nn.GRU(2, 3), nn.Linear(3, 1)),
        CheckpointError,
        "has 1.weight, 1.bias",
    ),
    (nn.Sequential(nn.GRU(2, 3), nn.GRU(3, 3)), CheckpointError, "it has 0., 1."),
    (nn.LSTMCell(2, 3), CheckpointError, "it has weight_ih"),
]


@pytest.mark.parametrize("module, kind, message", REFUSED, ids=lambda v: type(v).__name__)
def test_weights_of_more_than_a_layer_are_refused_by_name(tmp_path, module, kind, message):
    with pytest.raises(kind, match=message):
        make_layer(module.state_dict(), tmp_path / "weights.pt", {})


def test_shapes_of_no_cell_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no matrices weight_ih_l0 and weight_hh_l0"):
        make_layer({"bias_ih_l0": torch.zeros(8)}, tmp_path / "weights.pt", {})
    weights = dict(nn.LSTM(2, 3).state_dict())
    weights["weight_hh_l0"] = torch.zeros(6, 3)
    with pytest.raises(CheckpointError, match=r"has shape \[6, 3\]; an LSTM has four times"):
        make_layer(weights, tmp_path / "weights.pt", {})
    weights = dict(nn.LSTM(2, 3, num_layers=2).state_dict())
    del weights["weight_hh_l1"]
    with pytest.raises(CheckpointError, match=r"not of one whole layer .*weight_hh_l1"):
        make_layer(weights, tmp_path / "weights.pt", {})


@pytest.mark.parametrize("content", [b"", b"12345678", (9).to_bytes(8, "little") + b'{"a": 12}'])
def test_a_broken_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no safetensors file, or is cut short"):
        read_weights(path)
