"""Collects figures of several rounds and prints tables of them."""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")
Size = Literal["full", "quick", "smoke"]


@dataclass(frozen=True)
class Effort:
    """How long and how often to measure, and how much of a table."""

    rounds: int
    seconds: float
    size: Size = "full"

    def pick(self, *, full: T, quick: T, smoke: T | None = None) -> T:
        """The value for this size. A smoke run without its own value takes the quick one."""
        if self.size == "full":
            return full
        return quick if self.size == "quick" or smoke is None else smoke


def read_effort(description: str, *, rounds: int = 5, seconds: float = 1.5) -> Effort:
    """Read the effort from the command line."""
    parser = argparse.ArgumentParser(description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="one short round, to check that it works"
    )
    size.add_argument(
        "--smoke", action="store_true", help="one row, to check that the table can be made"
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="duration of one measurement"
    )
    given = parser.parse_args()
    if given.quick:
        return Effort(1, 1.0, "quick")
    if given.smoke:
        return Effort(1, 0.3, "smoke")
    return Effort(given.rounds, given.seconds)


class Figures:
    """Values of many rounds by name. Compared values are measured alternately, A B A B."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """Note the value of one more round."""
        self._values[name].append(value)

    def last(self, name: str) -> float:
        """The value of the latest round."""
        return self._values[name][-1]

    def least(self, name: str) -> float:
        """The smallest value. Errors only ever increase CPU time: others disturb the caches."""
        return min(self._values[name])

    def median(self, name: str) -> float:
        """The median."""
        return statistics.median(self._values[name])

    def percentile(self, name: str, percent: float) -> float:
        """The value that `percent` of all values do not exceed."""
        ordered = sorted(self._values[name])
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def ratio(self, name: str, by: str) -> float:
        """The median of the ratios of each round, which compare neighbours in time."""
        pairs = zip(self._values[name], self._values[by], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def excess(self, name: str, over: str) -> float:
        """The median of the differences of each round."""
        pairs = zip(self._values[name], self._values[over], strict=True)
        return statistics.median(a - b for a, b in pairs)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as Markdown."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        parts = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"| {' | '.join(parts)} |")
        if number == 0:
            rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            print(f"| {' | '.join(rules)} |")
    print(flush=True)


def bar() -> Progress:
    """A progress bar on standard error that disappears when the table is printed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
