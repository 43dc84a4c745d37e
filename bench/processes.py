"""Starts the processes that are measured, asks them, and ends them with the block."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice_cli.bench.watched import Usage, watch_process


@dataclass(frozen=True)
class Server:
    """A server in its own process: where it listens, and what it uses."""

    address: str
    pid: int
    http: str = ""

    def usage(self) -> Usage:
        """CPU seconds of all its threads, and resident bytes."""
        return watch_process(self.pid)()


@contextmanager
def sluice(models: dict[str, Path], *flags: str) -> Iterator[Server]:
    """`sluice serve` with these models."""
    command = [sys.executable, "-m", "sluice_cli", "serve"]
    command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags]
    for name, path in models.items():
        command += ["--model", f"{name}={path}"]
    with _running(command, stderr=subprocess.STDOUT) as process:
        ready = _read_ready(process)
        yield Server(ready["listen"], process.pid, ready["http"])


@contextmanager
def rival(module: str, *arguments: object) -> Iterator[Server]:
    """A server of this folder; `module` is its name, such as bench.echo."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with _running(command) as process:
        yield Server(_read_ready(process)["listen"], process.pid)


class Asked:
    """A process that answers lines of JSON with lines of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def kill(self) -> None:
        """End it at once: its connections break."""
        self._process.kill()
        self._process.wait()


@contextmanager
def asked(module: str, *arguments: object) -> Iterator[Asked]:
    """A process of this folder that answers questions."""
    with _running([sys.executable, "-m", module, *map(str, arguments)]) as process:
        yield Asked(process)


@contextmanager
def _running(command: list[str], stderr: int | None = None) -> Iterator[subprocess.Popen[str]]:
    # One core each for arithmetic, whatever the libraries would take by themselves.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _read_ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The line that says where a server listens. Raises RuntimeError with the log if none comes."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if '"ready"' in line:
            answer: dict[str, Any] = json.loads(line)
            # Read the rest of the log: a full pipe would stop the server.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return answer
    raise RuntimeError("the server did not start:\n" + "".join(lines))
