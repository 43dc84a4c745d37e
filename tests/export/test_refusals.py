"""What cannot be streamed is refused by name, with the fix, and leaves no file behind."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sluice_export import (
    BidirectionalError,
    ExportError,
    InputError,
    LayerError,
    NoRecurrentLayerError,
    OutputError,
    ParityError,
    TraceError,
    UnsupportedModuleError,
    export,
)


class Model(nn.Module):
    """A layer and a head; the tests vary what forward does with them."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6, batch_first=True, **options)
        self.head = nn.Linear(6, 2)


class LastStep(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class LastState(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[1][0][-1])


class TwoRowsAStep(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0].repeat_interleave(2, dim=1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.again(x)[0])[0]


class Never(Model):
    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Loop(Model):
    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in range(x.size(1)):
            y, state = self.cell(x[:, step : step + 1], state)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


class Packed(Model):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((x.size(0),), x.size(1))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0]


class PerFeature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(1, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, features = x.shape
        y = self.cell(x.transpose(1, 2).reshape(batch * features, steps, 1))[0]
        return y.reshape(batch, features, steps, 3).transpose(1, 2)


class StartsFromInput(Model):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x[:, 0]).unsqueeze(0)
        return self.cell(x, (h, torch.zeros_like(h)))[0]


class KeepsState(Model):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.cell(x)[0] * self.calls


class FixedState(Model):
    def __init__(self) -> None:
        super().__init__()
        self.state = (torch.zeros(1, 1, 6), torch.zeros(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, self.state)[0]


class Branches(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)[0]
        if y.sum() > 0:  # the line that the message names
            y = y * 2
        return y


class StepCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x


class TakesLengths(Model):
    def forward(self, x: Tensor, row_lengths: Tensor) -> Tensor:
        return self.cell(x)[0]


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"reads": nn.GRU(4, 4, bidirectional=True)})

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder["reads"](x)[0]


class Projected(Model):
    def __init__(self) -> None:
        super().__init__(proj_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class ReservedName(Model):
    def forward(self, lengths: Tensor) -> Tensor:
        return self.cell(lengths)[0]


REFUSED = [
    (Bidirectional(), BidirectionalError, "encoder.reads is bidirectional.*bidirectional=False"),
    (Projected(), LayerError, "cell has proj_size=3.*without proj_size"),
    (StepCell(), LayerError, "step is an nn.GRUCell.*use nn.GRU"),
    (Twice(), LayerError, "again is called 2 times.*its own layer"),
    (Loop(), LayerError, "cell is called 5 times.*once over the whole sequence"),
    (Never(), LayerError, "forgotten is never called.*remove it"),
    (Packed(), LayerError, "cell is given a packed sequence; leave out pack_padded_sequence"),
    (PerFeature(), LayerError, "cell sees 12 sequences of 7 steps when .* given 3 sequences"),
    (StartsFromInput(), LayerError, "cell starts from a state that is computed from the input"),
    (KeepsState(), UnsupportedModuleError, "two calls .* differ: it keeps a state"),
    (FixedState(), InputError, "failed on 3 sequences of 7 steps.*kept in an attribute"),
    (LastStep(), OutputError, r"has no time axis.*head\(y\) rather than head\(y\[:, -1\]\)"),
    (LastState(), OutputError, "has no time axis"),
    (TwoRowsAStep(), OutputError, r"\[3, 14, 6\].*one row for every step"),
    (Branches(), TraceError, r"test_refusals.py, line \d+ \(if y.sum\(\) > 0.*branch on values"),
    (ReservedName(), InputError, "the name 'lengths' is Sluice's own; rename"),
    (nn.Linear(4, 2), NoRecurrentLayerError, "Linear has no nn.LSTM, nn.GRU or nn.RNN"),
]


@pytest.mark.parametrize("module, kind, message", REFUSED, ids=lambda v: type(v).__name__)
def test_what_cannot_be_streamed_is_refused_with_the_fix(tmp_path, module, kind, message):
    with pytest.raises(kind, match=message):
        export(module, torch.zeros(1, 5, 4), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


INPUTS = [
    (torch.zeros(4), "input 'x' has shape.*a batch and a time axis"),
    (torch.zeros(1, 5, 9), "failed on the example inputs .*9"),
    ((), "has no tensor"),
    (3, "has no tensor"),
]


class Plain(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


@pytest.mark.parametrize("example, message", INPUTS)
def test_examples_that_do_not_fit_are_refused(tmp_path, example, message):
    with pytest.raises(InputError, match=message):
        export(Plain(), example, tmp_path / "model.onnx")


def test_an_unbatched_example_is_refused(tmp_path):
    with pytest.raises(LayerError, match="without a batch axis"):
        export(Plain(), torch.zeros(5, 4), tmp_path / "model.onnx")


def test_an_argument_without_time_axis_is_refused(tmp_path):
    with pytest.raises(InputError, match="'row_lengths' has shape"):
        export(TakesLengths(), (torch.zeros(1, 5, 4), torch.ones(1)), tmp_path / "model.onnx")


class OneHot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(6, 3, batch_first=True)

    def forward(self, codes: Tensor) -> Tensor:
        return self.cell(nn.functional.one_hot(codes, 6).float())[0]


def test_integers_of_unknown_range_are_asked_for(tmp_path):
    codes = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(InputError, match="range is unknown; name it: valid="):
        export(OneHot(), codes, tmp_path / "model.onnx")
    contract = export(OneHot(), codes, tmp_path / "model.onnx", valid={"codes": (0, 5)})
    assert (contract.inputs[0].valid.min, contract.inputs[0].valid.max) == (0, 5)


def test_a_range_for_an_input_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"\['token'\], but the inputs are x"):
        export(Plain(), torch.zeros(1, 5, 4), tmp_path / "model.onnx", valid={"token": (0, 5)})


class LooksAhead(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.flip(1))[0].flip(1)


class AddsMean(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)[0]
        return y - y.mean(dim=1, keepdim=True)


class AddsLast(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)[0]
        return y + y[:, -1:]


class MixesRows(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)[0]
        return y - y.mean(dim=0, keepdim=True)


class Convolves(Model):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv1d(4, 4, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.before(x.transpose(1, 2))[..., :-2].transpose(1, 2))[0]


class CountsSteps(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0] + torch.arange(x.size(1))[None, :, None]


NOT_STREAMS = [
    (LooksAhead(), "parity.stepwise", "flip"),
    (AddsMean(), "parity.stepwise", "y.mean"),
    (AddsLast(), "parity.stepwise", "-1:"),
    (MixesRows(), "parity.ragged", "y.mean"),
    (Convolves(), "parity.stepwise", "self.before"),
    (CountsSteps(), "parity.stepwise", "arange"),
]


@pytest.mark.parametrize("module, proof, code", NOT_STREAMS, ids=lambda v: type(v).__name__)
def test_a_proof_refuses_what_is_no_stream_and_names_the_line(tmp_path, module, proof, code):
    torch.manual_seed(0)
    with pytest.raises(ParityError) as caught:
        export(module, torch.zeros(1, 5, 4), tmp_path / "model.onnx")
    message = str(caught.value)
    assert message.startswith(f"{proof} failed: ")
    assert f"{Path(__file__).name}, line " in message
    assert code in message
    assert list(tmp_path.iterdir()) == []


def test_every_refusal_is_an_export_error():
    for _, kind, _ in REFUSED:
        assert issubclass(kind, ExportError)
