"""What the README tells people to type works as it is written."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes import free_port, running

README = Path(__file__).parents[1] / "README.md"


def section(title: str) -> list[tuple[str, str]]:
    """The code blocks of a section: (language, code) each."""
    text = README.read_text()
    start = text.index(f"\n## {title}\n")
    end = text.index("\n## ", start + 1)
    return re.findall(r"^```(\w+)\n(.*?)^```$", text[start:end], flags=re.M | re.S)


class Reader:
    """Someone who types what the README shows, with ports that are free on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {"8001": str(free_port()), "8002": str(free_port())}
        self.servers = ExitStack()
        self.environment = dict(os.environ)
        # As in an environment that was activated.
        programs = str(Path(sys.executable).parent)
        self.environment["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])

    def type(self, language: str, code: str) -> str:
        for port, free in self.ports.items():
            code = code.replace(f":{port}", f":{free}")
        if language == "python":
            return self.run([sys.executable, "-c", code])
        assert code.startswith("sluice serve")
        self.serve(shlex.split(code))
        return ""

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def serve(self, command: list[str]) -> None:
        ready = f"http://127.0.0.1:{self.ports['8002']}/readyz"
        self.servers.enter_context(
            running(command, ready=ready, environment=self.environment, folder=self.folder)
        )


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("reader"))
    with reader.servers:
        yield reader


@pytest.fixture(scope="module")
def quickstart(reader: Reader) -> list[str]:
    """What each block of the quickstart printed."""
    return [reader.type(language, code) for language, code in section("Quickstart")]


def test_the_quickstart_exports_serves_and_streams(quickstart: list[str]) -> None:
    exported, served, streamed = quickstart
    assert (exported, served) == ("", "")
    assert streamed == "(32,)\n" * 5


def test_the_quickstart_has_ten_lines() -> None:
    lines = [line for _, code in section("Quickstart") for line in code.splitlines() if line]
    assert len(lines) <= 10


def test_many_sequences_stream_as_the_readme_says(quickstart: list[str], reader: Reader) -> None:
    assert quickstart
    ((language, code),) = section("Many sequences")
    assert reader.type(language, code) == "(200, 50, 32)\n"
