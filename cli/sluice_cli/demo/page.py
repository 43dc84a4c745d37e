"""Shows what the demo found: pictures, tables and words, made from arrays."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

CHARACTERS = "⏎" + "".join(map(chr, range(32, 127)))
PLOT_WIDTH, PLOT_HEIGHT = 30, 10
# Of the passage that is shown: by then the state has built up.
SAMPLE = slice(100, 260)


@dataclass(frozen=True)
class Result:
    """What one model gave. Arrays are [sequences, steps, …]."""

    name: str
    codes: NDArray[np.int64]  # [sequences, steps + 1]
    logits: NDArray[np.float32]
    stateless: NDArray[np.float32]  # logits, with the state dropped at each step
    equal_floats: int  # of `logits`, bit for bit those of the offline run
    seconds: float
    latencies: NDArray[np.float64]  # seconds of each step
    metrics: str  # the page /metrics while all sequences lived

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
        """Every streamed float is that of the offline run."""
        return self.equal_floats == self.logits.size


def bits_per_character(
    logits: NDArray[np.float32], codes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """-log2 of what [sequences, steps, characters] give to the characters that came."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(x, codes[..., np.newaxis], axis=-1)[..., 0]
    bits: NDArray[np.float64] = (np.log(np.exp(x).sum(axis=-1)) - chosen) / np.log(2)
    return bits


def opening(sequences: int, characters: int) -> RenderableType:
    """What is going to happen."""
    return Text.from_markup(
        "[bold]Sluice demo[/bold]: about two minutes, all of it on this machine.\n\n"
        "Two processes train a character model each, an LSTM and a GRU of 256 units, on the\n"
        "English text inside Python, and export it to ONNX with proofs. A server loads both.\n"
        f"This process then streams {sequences} held-out passages of {characters} characters "
        "through each.\n"
    )


def findings(results: list[Result]) -> Iterator[RenderableType]:
    """Everything that was found, part by part."""
    yield ""
    yield Columns([_plot(result) for result in results], equal=True)
    yield _sample(results[0])
    yield _metrics_table(results)
    yield _summary(results)


def ending(command: str, output: Path, seconds: float) -> RenderableType:
    """Where things are, and what to try next."""
    lstm, gru = output / "lstm.onnx", output / "gru.onnx"
    return Group(
        "",
        f"Done in {seconds:.0f} seconds; the server has stopped. The models are in {output}/. "
        "To go on:",
        "",
        Text(
            f"  {command} inspect {lstm}\n"
            f"  {command} serve --model lstm={lstm} --model gru={gru}\n"
            f"  {command} stream lstm < {output / 'text.csv'}      (in another terminal)\n"
            "  curl --silent 127.0.0.1:8002/metrics | grep sluice_",
            style="bold",
            no_wrap=True,
        ),
    )


def _plot(result: Result) -> RenderableType:
    """Bits per character against the position in the text, on a logarithmic axis."""
    steps = result.bits.shape[1]
    edges = np.unique(np.geomspace(1, steps + 1, PLOT_WIDTH + 1).astype(int))
    curves = [
        [curve[start - 1 : stop - 1].mean() for start, stop in pairwise(edges)]
        for curve in (result.bits.mean(axis=0), result.stateless_bits.mean(axis=0))
    ]
    top = float(np.ceil(max(map(max, curves))))
    grid = [[" "] * len(curves[0]) for _ in range(PLOT_HEIGHT)]
    for curve, mark in zip(reversed(curves), ("[red]·[/red]", "[green]●[/green]"), strict=True):
        for column, value in enumerate(curve):
            line = min(int((1 - value / top) * PLOT_HEIGHT), PLOT_HEIGHT - 1)
            grid[line][column] = mark
    lines = [
        f"{top * (1 - row / PLOT_HEIGHT):4.1f} ┤{''.join(cells)}" for row, cells in enumerate(grid)
    ]
    width = len(curves[0])
    axis = f" 0.0 └{'─' * width}\n      1{f'{steps} characters read':>{width - 1}}"
    legend = "[green]●[/green] with its state   [red]·[/red] state dropped at each step"
    return Panel(
        "\n".join([*lines, axis, "", legend]),
        title=f"{result.name.upper()}: bits per character",
        padding=(1, 1),
    )


def _sample(result: Result) -> RenderableType:
    """One passage, and the characters of it that were predicted right."""
    text = result.codes[0, 1:][SAMPLE]
    table = Table(
        title=f"What the {result.name.upper()} foretold (· where it was wrong)", show_lines=True
    )
    table.add_column("right")
    table.add_column("next characters", width=80)
    table.add_row("the text", Text("".join(CHARACTERS[code] for code in text)))
    for name, logits, colour in (
        ("with state", result.logits, "green"),
        ("without", result.stateless, "red"),
    ):
        guesses = logits[0, SAMPLE].argmax(axis=-1)
        marks = [
            CHARACTERS[c] if c == guess else "·" for c, guess in zip(text, guesses, strict=True)
        ]
        table.add_row(f"{name}\n{(guesses == text).mean():.0%}", Text("".join(marks), style=colour))
    return table


def _metrics_table(results: list[Result]) -> RenderableType:
    """What /metrics said while all sequences of a model were alive."""
    table = Table(title="From /metrics, with all sequences alive")
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
    """The values of one model on a page of Prometheus' text format."""

    def __init__(self, page: str, model: str) -> None:
        pattern = rf'^sluice_(\w+){{model="{model}"}} (\S+)$'
        self._values = dict(re.findall(pattern, page, flags=re.MULTILINE))

    def __getitem__(self, name: str) -> float:
        return float(self._values[name])

    def mean(self, name: str) -> float:
        """Of a histogram's observations."""
        return self[f"{name}_sum"] / self[f"{name}_count"]


def _summary(results: list[Result]) -> RenderableType:
    table = Table(title="Summary")
    table.add_column("")
    for result in results:
        table.add_column(result.name.upper(), justify="right")
    rows = {
        "bits per character with state": [f"{result.bits.mean():.2f}" for result in results],
        "… state dropped at each step": [
            f"{result.stateless_bits.mean():.2f}" for result in results
        ],
        "steps streamed": [f"{result.latencies.size:,}" for result in results],
        "steps a second": [f"{result.latencies.size / result.seconds:,.0f}" for result in results],
        "time of a step, median": [f"{np.median(r.latencies) * 1e3:.1f} ms" for r in results],
        "time of a step, 99 of 100": [
            f"{np.quantile(result.latencies, 0.99) * 1e3:.1f} ms" for result in results
        ],
        "equal to the offline run, bit for bit": [_verdict(result) for result in results],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _verdict(result: Result) -> str:
    if result.is_bit_exact:
        return f"[green]all {result.logits.size:,} floats[/green]"
    return f"[red]{result.equal_floats:,} of {result.logits.size:,} floats[/red]"
