"""Every table of bench/ can be made, and has its place on the page."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.models import QUICK_HIDDEN, export_model
from bench.report import README, TABLES, place
from bench.table import Figures

ROOT = Path(__file__).parents[2]


class Commands:
    """The command of each table, two at a time: more would starve each other."""

    def __init__(self, size: str) -> None:
        self._size = size
        self._threads = ThreadPoolExecutor(2)
        self._running: list[subprocess.Popen[str]] = []
        self.done = {name: self._threads.submit(self._run, name) for name in TABLES}

    def _run(self, name: str) -> tuple[int, str, str]:
        """Its exit code, what it printed, and what it complained of."""
        process = subprocess.Popen(
            [sys.executable, "-m", f"bench.{name}", f"--{self._size}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # With the servers it starts it can then be ended as one.
            start_new_session=True,
        )
        self._running.append(process)
        shown, errors = process.communicate()
        return process.returncode, shown, errors

    def end(self) -> None:
        """End what still runs."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        self._threads.shutdown()


@pytest.fixture(scope="module", params=["smoke", pytest.param("quick", marks=pytest.mark.slow)])
def commands(request) -> Iterator[Commands]:
    export_model(QUICK_HIDDEN)
    commands = Commands(request.param)
    yield commands
    commands.end()


# Together they are a minute's work for two cores, and other tests may share these.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_made_by_one_command(name, commands) -> None:
    code, shown, errors = commands.done[name].result()
    assert code == 0, errors
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) >= 3
    assert "nan" not in shown


def test_every_table_has_its_place_on_the_page() -> None:
    text = README.read_text()
    for name in TABLES:
        assert "| new |" in place(text, name, "| new |")
        assert f"python -m bench.{name}" in text
    with pytest.raises(ValueError, match="no <!-- other -->"):
        place(text, "other", "")


def test_ratios_compare_what_was_measured_side_by_side() -> None:
    figures = Figures()
    for ours, bare in ((2, 1), (30, 10), (8, 2)):
        figures.add("ours", ours)
        figures.add("bare", bare)
    assert figures.ratio("ours", "bare") == 3
    assert figures.excess("ours", "bare") == 6
    assert figures.least("ours") == 2
    assert figures.median("ours") == 8
