"""Every form of model that can be exported, small; writes its proof figures into the guide.

python -m tests.export.forms
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from sluice_export import export, export_onnx
from sluice_protos.contract_pb2 import ModelContract
from tests import models
from tests.export import foreign_models as foreign

GUIDE: Final = Path(__file__).parents[2] / "docs" / "export.md"
BEGIN, END = "<!-- forms: begin -->\n", "<!-- forms: end -->\n"
X: Final = torch.zeros(1, 5, 8)
TOKENS: Final = torch.zeros(1, 5, dtype=torch.int64)


class TimeFirst(nn.Module):
    """Called with its state, [steps, batch, features], and gives the state back."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 16)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        return self.cell(x, (h, c))


class LearnedStart(nn.Module):
    """Starts from a state that was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 16, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x, self.start.expand(1, x.shape[0], 16).contiguous())[0]


class Tied(nn.Module):
    """Shares its embedding's weights with its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.cell = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 32)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.embedding(x))[0])


def _relu() -> nn.Module:
    return models.Recurrent(nn.RNN, nonlinearity="relu").eval()


def _torch(make: Callable[[], nn.Module], example: Any) -> Callable[[Path], ModelContract]:
    def run(folder: Path) -> ModelContract:
        torch.manual_seed(0)
        return export(make().eval(), example, folder / "model.onnx")

    return run


def _onnx(write: Callable[[Path], Path], **options: Any) -> Callable[[Path], ModelContract]:
    return lambda folder: export_onnx(
        write(folder / "source.onnx"), folder / "model.onnx", **options
    )


STATE: Final = torch.zeros(1, 2, 16)
FORMS: Final[dict[str, Callable[[Path], ModelContract]]] = {
    "LSTM, two layers, with a head": _torch(models.lstm_module, X),
    "GRU with a head": _torch(models.gru_module, X),
    "RNN (tanh)": _torch(models.rnn_module, X),
    "RNN (relu)": _torch(_relu, X),
    "tokens through an embedding": _torch(models.embedding_module, TOKENS),
    "embedding and head with shared weights": _torch(Tied, TOKENS),
    "LSTM and GRU, two inputs and outputs": _torch(
        models.multi_module, (torch.zeros(1, 5, 6), TOKENS)
    ),
    "called with (h, c), time first": _torch(TimeFirst, (torch.zeros(5, 2, 8), STATE, STATE)),
    "a learned initial state": _torch(LearnedStart, X),
    "ONNX: frame by frame, LSTM inside an If (as Silero VAD)": _onnx(
        foreign.write_voice_detector, fixed={"sr": 16000}, axes={"input": ("batch", 576)}
    ),
    "ONNX: a batch of 1 made variable (as DTLN)": _onnx(foreign.write_noise_mask),
    "ONNX: three caches, rows one by one (as GTCRN)": _onnx(foreign.write_speech_enhancer),
    "ONNX: four states in, one stack out": _onnx(foreign.write_stacked_states),
    "ONNX: tokens, one step a run (as an RNN-T predictor)": _onnx(foreign.write_predictor),
    "ONNX: states that were not exposed": _onnx(foreign.write_hidden_state),
    "ONNX: convolution with a cache, no lengths": _onnx(foreign.write_causal_convolution),
}


def make_table() -> str:
    """The table of the guide: each form with what its proofs measured here."""
    lines = [
        "| form | state | parity, worst | drift, 10,000 steps | the same bits | one run takes |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, run in FORMS.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lines.append(_row(name, run(Path(folder))))
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
