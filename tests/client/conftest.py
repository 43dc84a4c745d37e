"""The servers that client tests talk to."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.recording_server import RecordingServer


class ServerProcess:
    """`sluice serve` as users run it."""

    def __init__(self, models: dict[str, Path], *flags: str) -> None:
        command = [str(Path(sys.executable).with_name("sluice")), "serve"]
        for name, path in models.items():
            command += ["--model", f"{name}={path}"]
        command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )
        lines = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.append(line)
            if '"ready"' in line:
                self.address = json.loads(line)["listen"]
                return
        raise AssertionError("".join(lines))

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=30)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)


@pytest.fixture(scope="session")
def server(accumulator_file, lstm_file, embedding_file, multi_file) -> Iterator[ServerProcess]:
    process = ServerProcess(
        {
            "accumulator": accumulator_file,
            "lstm": lstm_file.path,
            "embedding": embedding_file.path,
            "multi": multi_file.path,
        }
    )
    yield process
    process.stop()


@pytest.fixture
def recorder() -> Iterator[RecordingServer]:
    with RecordingServer() as server:
        yield server
