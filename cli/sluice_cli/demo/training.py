"""Trains character models: an LSTM or a GRU that reads text and predicts the next character."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import rich.progress
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from sluice_export import export

# The codes are newline, then the printable characters of ASCII in order.
CHARACTERS: Final = "\n" + "".join(map(chr, range(32, 127)))
BATCH: Final = 64
WINDOW: Final = 64
LEARNING_RATE: Final = 1e-2
GRADIENT_NORM_MAX: Final = 1.0
# The share of rows whose state is set to zero at each window, so that the model also learns
# how texts begin.
RESTART_SHARE: Final = 0.05

Kind = Literal["lstm", "gru"]
State = tuple[Tensor, Tensor] | Tensor
# Called with the phase, the share of it that is done (0 to 1), and a text.
Show = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Progress:
    """The progress of a training."""

    share: float  # of the training time
    characters: int  # characters read
    bits: float  # per character, in the latest window


class CharacterModel(nn.Module):
    """Embedding, one recurrent layer, and a linear map to the logits of the next character."""

    def __init__(self, kind: Kind = "lstm", units: int = 256, *, dropout: float = 0.0) -> None:
        """`dropout` applies to the recurrent layer's input and output, the same at every step of
        a window (Gal & Ghahramani, arXiv 1512.05287, without the recurrent part).
        """
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), 64)
        layer = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
        self.recurrent = layer(64, units, batch_first=True)
        self.head = nn.Linear(units, len(CHARACTERS))
        self.dropout = dropout

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x [batch, steps] codes → logits [batch, steps, characters], the new state."""
        embedded = self._drop(self.embedding(x))
        y, state = self.recurrent(embedded, state)
        return self.head(self._drop(y)), state

    def _drop(self, x: Tensor) -> Tensor:
        """x [batch, steps, features] with one mask for all steps, in training."""
        if not self.training or not self.dropout:
            return x
        mask = torch.rand(x.shape[0], 1, x.shape[2]) >= self.dropout
        return x * mask / (1 - self.dropout)


def encode(text: str) -> NDArray[np.int64]:
    """The codes of a text's characters: [characters]. Other characters become "?"."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 31
    is_printable = (codes > 0) & (codes < len(CHARACTERS))
    return np.where(codes == ord("\n") - 31, 0, np.where(is_printable, codes, ord("?") - 31))


def decode(codes: NDArray[np.int64]) -> str:
    """The inverse of `encode`."""
    return "".join(CHARACTERS[code] for code in codes)


def read_corpus() -> tuple[str, str]:
    """The English help texts in Python, split by topic: (training text, held-out text)."""
    from pydoc_data.topics import topics

    plain = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})
    texts = [topics[name].translate(plain) for name in sorted(topics)]
    held_out = [text for place, text in enumerate(texts) if place % 8 == 4]
    trained_on = [text for place, text in enumerate(texts) if place % 8 != 4]
    return "\n".join(trained_on), "\n".join(held_out)


def train(
    kind: Kind,
    text: str,
    *,
    seconds: float,
    units: int = 256,
    dropout: float = 0.0,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> CharacterModel:
    """A character model of `text`, trained for `seconds` by truncated backpropagation through time.

    The text is read as several long streams in parallel. The state is carried from window
    to window, as when the model is served. Raises ValueError if the text is too short.
    """
    torch.manual_seed(seed)
    model = CharacterModel(kind, units, dropout=dropout)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()
    state: State | None = None
    characters = 0
    start = now()
    for x, y in _windows(encode(text)):
        share = min((now() - start) / seconds, 1.0)
        if share == 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * share)) / 2
        logits, state = model(x, _carry(state))
        loss = criterion(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_MAX)
        optimizer.step()
        characters += x.numel()
        if on_progress:
            on_progress(Progress(share, characters, loss.item() / math.log(2)))
    return model.eval()


def _windows(codes: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs x and y, each [batch, window], where y is x one character later.

    Row b of one window continues in row b of the next.
    """
    length = (len(codes) - 1) // BATCH
    if length < WINDOW:
        raise ValueError(f"the training text must have at least {BATCH * WINDOW + 1} characters")
    streams = torch.from_numpy(codes[: length * BATCH].reshape(BATCH, length).copy())
    following = torch.from_numpy(codes[1 : length * BATCH + 1].reshape(BATCH, length).copy())
    while True:
        for at in range(0, length - WINDOW + 1, WINDOW):
            yield streams[:, at : at + WINDOW], following[:, at : at + WINDOW]


def _carry(state: State | None) -> State | None:
    """The state for the next window: detached, and zero in a few rows."""
    if state is None:
        return None
    if isinstance(state, tuple):
        keep = (torch.rand(1, state[0].shape[1], 1) >= RESTART_SHARE).float()
        return state[0].detach() * keep, state[1].detach() * keep
    return state.detach() * (torch.rand(1, state.shape[1], 1) >= RESTART_SHARE).float()


def main(
    kind: Annotated[Kind, typer.Argument(help="The recurrent layer.")] = "lstm",
    output: Annotated[Path, typer.Option(help="The ONNX file to write.")] = Path("model.onnx"),
    text: Annotated[
        Path | None,
        typer.Option(help="A text file to train on; by default the help texts in Python."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long to train.")] = 60,
    units: Annotated[int, typer.Option(min=1, help="Units of the recurrent layer.")] = 256,
    dropout: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="The share of values to drop, the same at every step."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="The seed of the initial weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="How many cores to use.")] = 1,
    is_json: Annotated[bool, typer.Option("--json", help="Print progress as JSON lines.")] = False,
) -> None:
    """Train a character model and export it to an ONNX file that Sluice serves."""
    torch.set_num_threads(threads)
    corpus = read_corpus()[0] if text is None else text.read_text()
    with _show_lines() if is_json else _show_bar() as show:
        model = train(
            kind,
            corpus,
            seconds=seconds,
            units=units,
            dropout=dropout,
            seed=seed,
            on_progress=lambda at: show("train", at.share, f"{at.bits:.2f} bits a character"),
        )
        export(
            model,
            torch.zeros(2, 5, dtype=torch.int64),
            output,
            name=f"characters-{kind}",
            output_names=["logits"],
            on_progress=lambda what, share: show("export", share, what),
        )
        show("export", 1.0, "done")


@contextmanager
def _show_lines() -> Iterator[Show]:
    """Print one JSON object per line, for programs."""
    yield lambda phase, share, text: print(
        json.dumps({"phase": phase, "share": share, "text": text}), flush=True
    )


@contextmanager
def _show_bar() -> Iterator[Show]:
    """Show one progress bar for each phase, for people."""
    with rich.progress.Progress() as bars:
        tasks = {phase: bars.add_task(phase, total=1.0) for phase in ("train", "export")}
        yield lambda phase, share, text: bars.update(
            tasks[phase], completed=share, description=f"{phase}: {text}"
        )


if __name__ == "__main__":
    typer.run(main)
