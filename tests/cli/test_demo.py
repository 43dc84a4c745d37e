"""The demo goes through the whole path by itself, and its claims are measured."""

import io
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from sluice_cli.demo import page, run
from sluice_cli.demo.page import Result, bits_per_character
from sluice_cli.demo.run import DemoError, cut
from tests.processes import free_port, running

SEQUENCES, STEPS, CHARACTERS = 6, 40, 96


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def shown(output: Path) -> str:
    """What a short demo printed."""
    command = [sys.executable, "-m", "sluice_cli", "demo", "--train-seconds", "1"]
    command += ["--sequences", str(SEQUENCES), "--characters", str(STEPS), "--output", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def result() -> Result:
    generator = np.random.default_rng(0)
    shape = (SEQUENCES, STEPS, CHARACTERS)
    return Result(
        name="lstm",
        codes=generator.integers(0, CHARACTERS, (SEQUENCES, STEPS + 1)),
        logits=generator.standard_normal(shape).astype(np.float32),
        stateless=generator.standard_normal(shape).astype(np.float32),
        equal_floats=SEQUENCES * STEPS * CHARACTERS,
        seconds=1.0,
        latencies=generator.random((SEQUENCES, STEPS)),
        metrics="",
    )


def test_the_demo_streams_what_the_offline_run_gives_bit_for_bit(shown: str) -> None:
    floats = f"{SEQUENCES * STEPS * CHARACTERS:,}"
    assert len(re.findall(f"all {floats} floats", shown)) == 2


def test_the_demo_shows_the_metrics_of_live_sequences(shown: str) -> None:
    assert re.search(rf"sluice_sequences_live\W+{SEQUENCES}\W+{SEQUENCES}\W", shown)
    assert re.search(rf"sluice_steps_total\W+{SEQUENCES * STEPS}\W+{SEQUENCES * STEPS}\W", shown)


def test_the_demo_leaves_its_models_and_text(shown: str, output: Path) -> None:
    assert shown
    assert {"lstm.onnx", "gru.onnx", "text.csv"} <= {file.name for file in output.iterdir()}
    assert len((output / "text.csv").read_text().split()) == STEPS


def test_the_commands_to_try_next_work(shown: str, output: Path) -> None:
    tail = shown[shown.index("What to try next:") :]
    inspect, serve, stream = (
        shlex.split(line, comments=True) for line in tail.splitlines() if "sluice_cli" in line
    )
    inspected = subprocess.run(inspect, check=True, capture_output=True, text=True)
    assert "characters-lstm" in inspected.stdout
    grpc, http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    command, text = stream[: stream.index("<")], Path(stream[-1])
    serve += ["--listen", grpc, "--http", http]
    with running(serve, ready=f"http://{http}/readyz"), text.open() as rows:
        streamed = subprocess.run(
            [*command, "--address", grpc], check=True, stdin=rows, capture_output=True, text=True
        )
    lines = streamed.stdout.splitlines()
    assert len(lines) == STEPS
    assert len(lines[0].split(",")) == CHARACTERS


def test_a_single_differing_float_is_told(result: Result) -> None:
    assert result.is_bit_exact
    assert "all" in page._verdict(result)
    differing = replace(result, equal_floats=result.equal_floats - 1)
    assert not differing.is_bit_exact
    assert "all" not in page._verdict(differing)


def test_bits_per_character_are_those_of_pytorch(result: Result) -> None:
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(result.logits).flatten(0, 1).double(),
        torch.from_numpy(result.codes[:, 1:]).flatten(),
        reduction="none",
    )
    bits = bits_per_character(result.logits, result.codes[:, 1:])
    np.testing.assert_allclose(bits.flatten() * np.log(2), expected.numpy())


def test_the_pictures_fit_a_terminal_of_eighty_columns(result: Result) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for part in (page._plot(result), page._sample(result)):
        console.print(part)
    lines = console.export_text().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("●" in line for line in lines)


def test_passages_are_evenly_apart_and_inside_the_text() -> None:
    passages = cut(np.arange(1000), 4, 99)
    assert passages.shape == (4, 100)
    assert passages[0, 0] == 0
    assert passages[-1, -1] == 999
    assert (np.diff(passages, axis=1) == 1).all()


async def test_a_training_that_fails_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"train-rnn\.log says why"):
        await run._train("rnn", tmp_path, 1, Progress())
    assert "is not one of" in (tmp_path / "train-rnn.log").read_text()
