"""Starts servers as processes of their own, waits until they answer, and ends them."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

START_SECONDS_MAX = 60
STOP_SECONDS_MAX = 30


def free_port() -> int:
    """A port of the loopback interface on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str | Path],
    *,
    ready: str,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process that has answered the URL `ready`, ended with the block by SIGTERM."""
    process = subprocess.Popen(
        command, env=environment, cwd=folder, text=True, stderr=subprocess.PIPE
    )
    try:
        _wait_for(ready, process)
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=STOP_SECONDS_MAX)


def _wait_for(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"{url}: {error}\n{process.communicate()[1]}")
            time.sleep(0.05)
