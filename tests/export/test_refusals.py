"""What cannot be streamed is refused by name, with the fix, and leaves no file behind."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sluice_export import (
    BidirectionalError,
    ConvolutionError,
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


class TwoRowsAStep(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0].repeat_interleave(2, dim=1)


class Never(Model):
    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class LeavesOut(Model):
    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in range(1, x.size(1)):
            y, state = self.cell(x[:, step : step + 1], state)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


class Forgets(Model):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.cell(part)[0] for part in x.split(1, dim=1)], dim=1)


class Normalises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.GRUCell(4, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = None, []
        for row in x.unbind(1):
            h = self.norm(self.step(row, h))
            outputs.append(h)
        return torch.stack(outputs, dim=1)


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


class ReservedName(Model):
    def forward(self, lengths: Tensor) -> Tensor:
        return self.cell(lengths)[0]


class NoBatch(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0].mean(dim=0)


class NoTensor(Model):
    def forward(self, x: Tensor) -> list[object]:
        return [self.cell(x)[0], "done"]


class Nothing(Model):
    def forward(self, x: Tensor) -> None:
        self.cell(x)


class Convolves(nn.Module):
    """A convolution over time before a layer; the tests vary its padding."""

    def __init__(self, front: int = 0, behind: int = 0, **options: object) -> None:
        super().__init__()
        self.before = nn.Conv1d(4, 4, 3, **options)
        self.cell = nn.GRU(4, 4, batch_first=True)
        self.padding = (front, behind)

    def convolve(self, x: Tensor) -> Tensor:
        y = self.before(functional.pad(x.transpose(1, 2), self.padding))
        return y[..., : x.size(1)].transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.convolve(x))[0]


class ConvolvesTwice(Convolves):
    def convolve(self, x: Tensor) -> Tensor:
        return super().convolve(super().convolve(x))


class ConvolvesApart(Convolves):
    """Each feature is a row of its own to the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv1d(1, 1, 3)

    def convolve(self, x: Tensor) -> Tensor:
        rows = functional.pad(x.transpose(1, 2).flatten(0, 1).unsqueeze(1), (2, 0))
        return self.before(rows).unflatten(0, (x.shape[0], 4)).squeeze(2).transpose(1, 2)


class Strides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv1d(4, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.before(functional.pad(x, (0, 0, 2, 0)).transpose(1, 2))


class NeverConvolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pointwise = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(x.transpose(1, 2)).transpose(1, 2)


AHEAD = "before looks at steps to come: with kernel_size=3 and dilation=1.* 2 steps in front"
REFUSED = [
    (Bidirectional(), BidirectionalError, "encoder.reads is bidirectional.*bidirectional=False"),
    (StepCell(), LayerError, "step is never called by forward"),
    (LeavesOut(), LayerError, "cell is called 6 times for 7 steps and 10 times for 11; call it"),
    (Forgets(), LayerError, "cell is given, at a step, another state than the one it returned"),
    (Normalises(), LayerError, "step is given, at a step, another state.*pass the state on as"),
    (Never(), LayerError, "forgotten is never called.*remove it"),
    (Packed(), LayerError, "cell is given a packed sequence; leave out pack_padded_sequence"),
    (PerFeature(), LayerError, "cell sees 12 sequences of 7 steps when .* given 3 sequences"),
    (StartsFromInput(), LayerError, "cell starts from a state that is computed from the input"),
    (KeepsState(), UnsupportedModuleError, "two calls .* differ: it keeps a state"),
    (FixedState(), InputError, "failed on 3 sequences of 7 steps.*kept in an attribute"),
    (NoBatch(), OutputError, r"result 0 of forward, \[7, 6\], has no batch axis"),
    (NoTensor(), OutputError, "forward returns a str; return tensors only"),
    (Nothing(), OutputError, "forward returns no tensor"),
    (Convolves(1, 1), ConvolutionError, AHEAD),
    (Convolves(0, 2), ConvolutionError, AHEAD),
    (Convolves(padding="same"), ConvolutionError, AHEAD),
    (Convolves(padding=1), ConvolutionError, AHEAD),
    (Convolves(padding=2, padding_mode="replicate"), ConvolutionError, AHEAD),
    (Strides(), ConvolutionError, "before has stride 2 along time"),
    (ConvolvesTwice(2, 0), ConvolutionError, "before is called 2 times in one forward"),
    (ConvolvesApart(), ConvolutionError, r"before is given \[12, 1, 9\] for 3 sequences of 7"),
    (NeverConvolves(), NoRecurrentLayerError, "no convolution over time, so it has no state"),
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


class ConvolvesByFunction(Model):
    def forward(self, x: Tensor) -> Tensor:
        before = functional.pad(x, (0, 0, 2, 0)).transpose(1, 2)
        return self.cell(functional.conv1d(before, torch.eye(4)[..., None].tile(3)).mT)[0]


class CountsSteps(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0] + torch.arange(x.size(1))[None, :, None]


class FirstStep(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, 0])


class MeanOfSteps(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)[0]
        pooled = y.mean(dim=1)
        return self.head(pooled)


class Attends(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)[0]
        weights = torch.softmax(self.head(y)[..., :1], dim=1)
        return (weights * y).sum(1)


class FeedsBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.GRUCell(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, h, outputs = x.new_zeros(x.size(0), 2), None, []
        for row in x.unbind(1):
            given = torch.cat([row, y], dim=1)
            h = self.step(given, h)
            y = self.head(h)
            outputs.append(y)
        return torch.stack(outputs, dim=1)


class CountsConvolved(Convolves):
    def convolve(self, x: Tensor) -> Tensor:
        y = super().convolve(x)
        return y + torch.arange(x.size(1))[None, :, None]


class CutsWrongEnd(Convolves):
    def convolve(self, x: Tensor) -> Tensor:
        return self.before(x.transpose(1, 2))[..., 2:].transpose(1, 2)


NOT_STREAMS = [
    (FirstStep(), "parity.whole", "[:, 0]"),
    (MeanOfSteps(), "parity.whole", "pooled = y.mean"),
    (Attends(), "parity.whole", "torch.softmax"),
    (FeedsBack(), "parity.whole", "given = torch.cat"),
    (CountsConvolved(2), "parity.whole", "torch.arange"),
    (LooksAhead(), "parity.stepwise", "flip"),
    (AddsMean(), "parity.stepwise", "y.mean"),
    (AddsLast(), "parity.stepwise", "-1:"),
    (MixesRows(), "parity.ragged", "y.mean"),
    (ConvolvesByFunction(), "parity.stepwise", "functional.conv1d"),
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


class Locked(Model):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


def test_a_module_that_cannot_be_copied_is_refused(tmp_path):
    with pytest.raises(UnsupportedModuleError, match=r"cannot be copied .*build it afresh"):
        export(Locked(), torch.zeros(1, 5, 4), tmp_path / "model.onnx")


class OnlyState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, x)[0]


def test_a_state_without_a_sequence_is_refused(tmp_path):
    with pytest.raises(InputError, match="every example input is a state; give the sequence"):
        export(OnlyState(), torch.zeros(1, 1, 4), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "names, kind, message",
    [
        (["a", "b"], OutputError, "returns 1 outputs that are no state, but output_names has 2"),
        (["x"], InputError, "the name 'x' is taken twice, or empty; rename"),
        (["state"], InputError, "the name 'state' is Sluice's own; rename"),
    ],
)
def test_names_of_outputs_that_do_not_fit_are_refused(tmp_path, names, kind, message):
    with pytest.raises(kind, match=message):
        export(Plain(), torch.zeros(1, 5, 4), tmp_path / "model.onnx", output_names=names)


class ReadsC(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[1][1][-1])


@pytest.mark.parametrize(
    "module, what",
    [
        (ReadsC(), "the c of cell"),
        (CutsWrongEnd(padding=2), "what before gives beyond the last step"),
    ],
)
def test_what_is_known_at_the_last_step_only_is_refused_by_name(tmp_path, module, what):
    with pytest.raises(ParityError, match=f"not known at every step: {what}"):
        export(module, torch.zeros(1, 5, 4), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_every_refusal_is_an_export_error():
    for _, kind, _ in REFUSED:
        assert issubclass(kind, ExportError)
