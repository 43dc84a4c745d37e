"""Every form of model that can be exported, small; writes its proof figures into the guide.

python -m tests.export.forms
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice_export import export, export_onnx
from sluice_protos.contract_pb2 import ModelContract
from tests import models
from tests.export import torch_models as made
from tests.export.foreign_cases import CASES, drive

GUIDE: Final = Path(__file__).parents[2] / "docs" / "export.md"
BEGIN, END = "<!-- forms: begin -->\n", "<!-- forms: end -->\n"
X: Final = torch.zeros(1, 5, 8)
X_TIME_FIRST: Final = torch.zeros(5, 1, 8)
TOKENS: Final = torch.zeros(1, 5, dtype=torch.int64)
STATE: Final = torch.zeros(1, 2, 16)

Arrays = Mapping[str, np.ndarray]


class Form(Protocol):
    """A form of model: how to export one, and what it gives without any of ours."""

    # Whether streamed outputs have the very bits of the source.
    is_exact: bool

    def export(self, folder: Path) -> ModelContract:
        """Write `folder`/model.onnx."""

    def run(self, folder: Path, inputs: Arrays) -> dict[str, np.ndarray]:
        """What the source gives for one sequence [steps, …]: each output [steps, …]."""


@dataclass(frozen=True)
class TorchForm:
    """A PyTorch module."""

    make: Callable[[], nn.Module]
    example: Any = X
    # The states that forward takes behind its inputs, and whether time is the first axis.
    states: tuple[Tensor, ...] = ()
    is_batch_first: bool = True
    # Outputs of one value for the sequence so far.
    so_far: tuple[str, ...] = ()
    is_exact: bool = False

    def module(self) -> nn.Module:
        """The module, always with the same weights."""
        torch.manual_seed(0)
        return self.make().eval()

    def export(self, folder: Path) -> ModelContract:
        """As Form.export."""
        return export(self.module(), self.example, folder / "model.onnx")

    def run(self, folder: Path, inputs: Arrays) -> dict[str, np.ndarray]:
        """As Form.run: the module on the whole sequence, or on each of its beginnings."""
        module = self.module()
        steps = len(next(iter(inputs.values())))
        outputs = self._call(module, inputs)
        for name in self.so_far:
            begun = [
                self._call(module, {n: array[: step + 1] for n, array in inputs.items()})
                for step in range(steps)
            ]
            outputs[name] = torch.cat([found[name] for found in begun])
        for name in outputs.keys() - set(self.so_far):
            outputs[name] = outputs[name][0] if self.is_batch_first else outputs[name][:, 0]
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    def _call(self, module: nn.Module, inputs: Arrays) -> dict[str, Tensor]:
        tensors = [torch.from_numpy(array).unsqueeze(0) for array in inputs.values()]
        if not self.is_batch_first:
            tensors = [tensor.transpose(0, 1) for tensor in tensors]
        with torch.no_grad():
            result = module(*tensors, *self.states)
        if isinstance(result, dict):
            return result
        found = pytree.tree_leaves(result)[: None if not self.states else 1]
        names = ["y"] if len(found) == 1 else [f"y_{place}" for place in range(len(found))]
        return dict(zip(names, found, strict=True))


@dataclass(frozen=True)
class OnnxForm:
    """An ONNX file made elsewhere: one of the cases."""

    name: str

    @property
    def is_exact(self) -> bool:
        """As Form.is_exact."""
        return CASES[self.name].is_exact

    def export(self, folder: Path) -> ModelContract:
        """As Form.export."""
        case = CASES[self.name]
        source = case.write(folder / "source.onnx")
        return export_onnx(source, folder / "model.onnx", **case.options)

    def run(self, folder: Path, inputs: Arrays) -> dict[str, np.ndarray]:
        """As Form.run: the file as it was, by hand."""
        return drive(folder / "source.onnx", CASES[self.name], dict(inputs))


def _relu() -> nn.Module:
    return models.Recurrent(nn.RNN, nonlinearity="relu")


_LSTM_START: Final = (torch.zeros(1, 1, 16), torch.zeros(1, 1, 16))
_CELL_START: Final = (torch.zeros(1, 16), torch.zeros(1, 16))
FORMS: Final[dict[str, Form]] = {
    "LSTM, two layers, with a head": TorchForm(models.lstm_module),
    "GRU with a head": TorchForm(models.gru_module),
    "RNN (tanh)": TorchForm(models.rnn_module),
    "RNN (relu)": TorchForm(_relu),
    "tokens through an embedding": TorchForm(models.embedding_module, TOKENS),
    "embedding and head with shared weights": TorchForm(made.Tied, TOKENS),
    "LSTM and GRU, two inputs and outputs": TorchForm(
        models.multi_module, (torch.zeros(1, 5, 6), TOKENS)
    ),
    "called with (h, c), time first": TorchForm(
        made.TimeFirst, (torch.zeros(5, 2, 8), STATE, STATE), _LSTM_START, is_batch_first=False
    ),
    "a learned initial state": TorchForm(made.LearnedStart),
    "nn.LSTMCell in a loop over time": TorchForm(made.LSTMLoop),
    "nn.GRUCell and nn.RNNCell in a loop, called with h": TorchForm(
        made.CellStack,
        (torch.zeros(5, 2, 8), torch.zeros(2, 16), torch.zeros(2, 16)),
        _CELL_START,
        is_batch_first=False,
    ),
    "nn.LSTM in a loop over time": TorchForm(made.LayerLoop, X_TIME_FIRST, is_batch_first=False),
    "a head on the last step, y[:, -1]": TorchForm(made.LastStep, so_far=("y",)),
    "a head on the last h, beside every step": TorchForm(made.LastState, so_far=("scores",)),
    "an encoder that gives its last h": TorchForm(made.Encoder, so_far=("y",)),
    "causal convolution before a GRU": TorchForm(made.ConvolutionBefore),
    "causal convolutions alone": TorchForm(made.ConvolutionsOnly),
    "LSTM with proj_size": TorchForm(made.Projected),
    "one layer called twice": TorchForm(made.Twice),
    "ONNX: frame by frame, LSTM inside an If (as Silero VAD)": OnnxForm("voice"),
    "ONNX: a batch of 1 made variable (as DTLN)": OnnxForm("mask"),
    "ONNX: three caches, rows one by one (as GTCRN)": OnnxForm("enhancer"),
    "ONNX: four states in, one stack out": OnnxForm("stacked"),
    "ONNX: tokens, one step a run (as an RNN-T predictor)": OnnxForm("predictor"),
    "ONNX: states that were not exposed": OnnxForm("hidden"),
    "ONNX: states that start from constants": OnnxForm("constant"),
    "ONNX: convolution with a cache, no lengths": OnnxForm("convolution"),
}


def make_table() -> str:
    """The table of the guide: each form with what its proofs measured here."""
    lines = [
        "| form | state | parity, worst | drift, 10,000 steps | the same bits | one run takes |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, form in FORMS.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lines.append(_row(name, form.export(Path(folder))))
    return "\n".join(lines) + "\n"


def _row(name: str, contract: ModelContract) -> str:
    parity = [proof for proof in contract.proofs if proof.name.startswith("parity")]
    drift = [proof for proof in contract.proofs if proof.name.startswith("drift")]
    figures = [
        f"{max(p.figure for p in group):.1g} ({max(p.ulps for p in group):.0f} ulps)"
        for group in (parity, drift)
    ]
    is_exact = all(p.passed for p in contract.proofs if p.name.startswith("bits"))
    exact = f"yes, from batch {contract.batch_min}" if is_exact else "no"
    exact += f" and {contract.length_min} steps" if contract.length_min > 1 else ""
    takes = "chunks" if contract.lengths_input else "chunks of equal length"
    takes = "one step" if contract.is_one_step else takes
    takes += " of one row" if contract.batch_max == 1 else ""
    return f"| {name} | {contract.state_size} | {figures[0]} | {figures[1]} | {exact} | {takes} |"


def main() -> None:
    """Write the table into the guide."""
    text = GUIDE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    GUIDE.write_text(before + BEGIN + make_table() + END + after)


if __name__ == "__main__":
    main()
