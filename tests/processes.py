"""Starts servers as processes of their own, waits until they answer, and ends them."""

import os
import secrets
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

import pytest

START_SECONDS_MAX = 60
STOP_SECONDS_MAX = 30


def free_port() -> int:
    """A port of the loopback interface on which nobody listens.

    Below those that Linux gives to connections: until the server listens there, and while
    it is away, a connection could be given just this one.
    """
    while True:
        port = 12_000 + secrets.randbelow(20_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@contextmanager
def running(
    command: Sequence[str | Path],
    *,
    ready: str,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process that has answered the URL `ready`, ended with the block by SIGTERM."""
    # A file, not a pipe: one that nobody reads would stop the server once it is full.
    with TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, cwd=folder, text=True, stderr=said)
        try:
            _wait_for(ready, process, said)
            yield process
        finally:
            process.terminate()
            process.wait(STOP_SECONDS_MAX)


def _wait_for(url: str, process: subprocess.Popen[str], said: TextIO) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                said.seek(0)
                pytest.fail(f"{url}: {error}\n{said.read()}")
            time.sleep(0.05)
