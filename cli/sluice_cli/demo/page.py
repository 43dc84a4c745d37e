"""Shows the results of the demo: plots, tables and text, made from arrays."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.columns import Columns
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

CHARACTERS = "⏎" + "".join(map(chr, range(32, 127)))
PLOT_WIDTH, PLOT_HEIGHT = 24, 10
# The end of the first passage, where the state has seen much text.
SAMPLE, SAMPLE_WIDTH = slice(-180, None), 60


@dataclass(frozen=True)
class Result:
    """The results of one model. Arrays are [sequences, steps, …]."""

    name: str
    codes: NDArray[np.int64]  # [sequences, steps + 1]
    logits: NDArray[np.float32]
    stateless: NDArray[np.float32]  # logits, with the state dropped at each step
    equal_floats: int  # how many of `logits` equal those of the offline run, bit for bit
    seconds: float
    latencies: NDArray[np.float64]  # seconds of each step
    metrics: str  # the page /metrics while all sequences were live

    @cached_property
    def bits(self) -> NDArray[np.float64]:
        """Bits per character: [sequences, steps]."""
        return bits_per_character(self.logits, self.codes[:, 1:])

    @cached_property
    def stateless_bits(self) -> NDArray[np.float64]:
        """The same with the state dropped at each step."""
        return bits_per_character(self.stateless, self.codes[:, 1:])

    @property
    def is_bit_exact(self) -> bool:
        """True if every streamed float equals that of the offline run."""
        return self.equal_floats == self.logits.size


def bits_per_character(
    logits: NDArray[np.float32], codes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """-log2 of the probability of each character that came next: [sequences, steps]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(x, codes[..., np.newaxis], axis=-1)[..., 0]
    bits: NDArray[np.float64] = (np.log(np.exp(x).sum(axis=-1)) - chosen) / np.log(2)
    return bits


def opening(sequences: int, characters: int) -> RenderableType:
    """What the demo is about to do."""
    return Text.from_markup(
        "[bold]Sluice demo[/bold]: about two minutes, all of it on this machine.\n\n"
        "Two processes each train a character model, an LSTM and a GRU of 256 units, on the "
        "English help texts in Python, and export it to ONNX with proofs. A server loads both. "
        f"This process then streams {sequences} held-out passages of {characters} characters "
        "through each model: all passages at the same time, one character at a time.\n"
    )


def findings(results: list[Result]) -> Iterator[RenderableType]:
    """All results, part by part."""
    yield ""
    yield Columns([_plot(result) for result in results], equal=True)
    yield _sample(results[0])
    yield ""
    yield _metrics_table(results)
    yield ""
    yield _summary(results)


def ending(command: str, output: Path, seconds: float) -> Text:
    """Commands to try next."""
    lstm, gru = output / "lstm.onnx", output / "gru.onnx"
    commands = (
        f"{command} inspect {lstm}",
        f"{command} serve --model lstm={lstm} --model gru={gru}",
        f"{command} stream lstm < {output / 'text.csv'}    # in another terminal",
        "curl --silent 127.0.0.1:8002/metrics | grep sluice_",
    )
    words = f"\nDone in {seconds:.0f} seconds; the server has stopped. What to try next:\n\n"
    return Text(words).append("".join(f"  {line}\n" for line in commands), "bold")


def _plot(result: Result) -> RenderableType:
    """Bits per character against the position in the text, on a logarithmic axis."""
    steps = result.bits.shape[1]
    edges = np.unique(np.geomspace(1, steps + 1, PLOT_WIDTH + 1).astype(int))
    curves = [
        np.array([curve[start - 1 : stop - 1].mean() for start, stop in pairwise(edges)])
        for curve in (result.bits.mean(axis=0), result.stateless_bits.mean(axis=0))
    ]
    low, high = np.floor(np.min(curves)), np.ceil(np.max(curves))
    grid = [[" "] * len(curves[0]) for _ in range(PLOT_HEIGHT)]
    for curve, mark in zip(reversed(curves), ("[red]·[/red]", "[green]●[/green]"), strict=True):
        heights = ((high - curve) / (high - low) * PLOT_HEIGHT).astype(int)
        for column, line in enumerate(np.clip(heights, 0, PLOT_HEIGHT - 1)):
            grid[line][column] = mark
    lines = [
        f"{high - (high - low) * row / PLOT_HEIGHT:4.1f} ┤{''.join(cells)}"
        for row, cells in enumerate(grid)
    ]
    width = len(curves[0])
    axis = f"{low:4.1f} └{'─' * width}\n      1{f'{steps}':>{width - 1}}\n      characters read"
    legend = "[green]●[/green] with state   [red]·[/red] without"
    return Panel(
        "\n".join([*lines, axis, "", legend]),
        title=f"{result.name.upper()}: bits per character",
        width=PLOT_WIDTH + 15,
    )


def _sample(result: Result) -> RenderableType:
    """A passage, and which of its characters were predicted."""
    text = result.codes[0, 1:][SAMPLE]
    rows = {"the text": ("", np.ones(len(text), bool))}
    for name, logits, colour in (
        ("with state", result.logits, "green"),
        ("without", result.stateless, "red"),
    ):
        is_right = logits[0, SAMPLE].argmax(axis=-1) == text
        rows[f"{name}, {is_right.mean():.0%}"] = (colour, is_right)
    shown = Text()
    for start in range(0, len(text), SAMPLE_WIDTH):
        line = slice(start, start + SAMPLE_WIDTH)
        for name, (colour, is_right) in rows.items():
            pairs = zip(text[line], is_right[line], strict=True)
            marks = "".join(CHARACTERS[code] if right else "·" for code, right in pairs)
            shown.append(f"{name:<16}", "dim").append(f"{marks}\n", colour)
        shown.append("\n")
    shown.rstrip()
    title = f"Characters of one passage that the {result.name.upper()} predicted (· wrong)"
    return Panel(shown, title=title, width=SAMPLE_WIDTH + 20)


def _metrics_table(results: list[Result]) -> RenderableType:
    """The values of /metrics while all sequences of a model were live."""
    table = Table(title="From /metrics, with all sequences live")
    table.add_column("metric")
    for result in results:
        table.add_column(result.name.upper(), justify="right")
    pages = [_Metrics(result.metrics, result.name) for result in results]
    rows = {
        "sluice_sequences_live": [f"{page['sequences_live']:,.0f}" for page in pages],
        "sluice_state_bytes": [f"{page['state_bytes']:,.0f}" for page in pages],
        "sluice_steps_total": [f"{page['steps_total']:,.0f}" for page in pages],
        "sluice_runs_total": [f"{page['runs_total']:,.0f}" for page in pages],
        "sluice_run_sequences, mean": [f"{page.mean('run_sequences'):.1f}" for page in pages],
        "sluice_padding_steps_total": [f"{page['padding_steps_total']:,.0f}" for page in pages],
        "sluice_run_seconds, mean": [f"{page.mean('run_seconds') * 1e3:.2f} ms" for page in pages],
        "sluice_queue_seconds, mean": [
            f"{page.mean('queue_seconds') * 1e3:.2f} ms" for page in pages
        ],
        "sluice_response_seconds, mean": [
            f"{page.mean('response_seconds') * 1e3:.2f} ms" for page in pages
        ],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


class _Metrics:
    """The values of one model on a page in Prometheus' text format."""

    def __init__(self, page: str, model: str) -> None:
        pattern = rf'^sluice_(\w+){{model="{model}"}} (\S+)$'
        self._values = dict(re.findall(pattern, page, flags=re.MULTILINE))

    def __getitem__(self, name: str) -> float:
        return float(self._values[name])

    def mean(self, name: str) -> float:
        """The mean of a histogram's observations."""
        return self[f"{name}_sum"] / self[f"{name}_count"]


def _summary(results: list[Result]) -> RenderableType:
    table = Table(title="Summary")
    table.add_column("")
    for result in results:
        table.add_column(result.name.upper(), justify="right")
    rows = {
        "bits per character with state": [f"{result.bits.mean():.2f}" for result in results],
        "bits per character without state": [
            f"{result.stateless_bits.mean():.2f}" for result in results
        ],
        "steps streamed": [f"{result.latencies.size:,}" for result in results],
        "steps a second": [f"{result.latencies.size / result.seconds:,.0f}" for result in results],
        "time of a step, median": [f"{np.median(r.latencies) * 1e3:.1f} ms" for r in results],
        "time of a step, 99 of 100": [
            f"{np.quantile(result.latencies, 0.99) * 1e3:.1f} ms" for result in results
        ],
        "equal to the offline run": [_verdict(result) for result in results],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _verdict(result: Result) -> str:
    if result.is_bit_exact:
        return f"[green]all {result.logits.size:,} floats[/green]"
    return f"[red]{result.equal_floats:,} of {result.logits.size:,} floats[/red]"
