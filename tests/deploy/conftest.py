"""What the deployment's tests share: the image once built, a tiny model, a free port."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Image, build
from tests.models import ExportedModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return build(ROOT / "Dockerfile", tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def model_file(lstm_file: ExportedModel) -> Path:
    return lstm_file.path


@pytest.fixture
def free_port() -> Callable[[], int]:
    def take() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return take


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process of our own, ended by its id when the test is over."""
    process = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def wait_for(url: str, process: subprocess.Popen[str], *, seconds: float = 60) -> None:
    """Return once `url` answers with success."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"{url}: {error}\n{process.communicate()[1]}")
            time.sleep(0.05)


@pytest.fixture(scope="session")
def debian_program() -> Callable[[str, str], str]:
    """The path of a program; the test fails, naming the package, when it is not there."""

    def find(program: str, package: str) -> str:
        unpacked = ROOT / ".venv" / "debian" / "usr" / "bin"
        found = shutil.which(program, path=os.pathsep.join([os.environ["PATH"], str(unpacked)]))
        if found is None:
            pytest.fail(
                f"this test starts a real {program}, which the Debian package {package!r} has: "
                f"`make test` fetches it, and so does `apt-get install {package}`"
            )
        return found

    return find
