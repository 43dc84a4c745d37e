"""What the deployment's tests share: the image once built, a tiny model, Debian's programs."""

import os
import shutil
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def debian_program() -> Callable[[str, str], str]:
    """The path of a program; the test fails, naming the package, when it is not there."""

    def find(program: str, package: str) -> str:
        unpacked = ROOT / ".venv" / "debian"
        folders = [os.environ["PATH"], str(unpacked / "bin"), str(unpacked / "usr" / "bin")]
        found = shutil.which(program, path=os.pathsep.join(folders))
        if found is None:
            pytest.fail(
                f"this test starts a real {program}, which the Debian package {package!r} has: "
                f"`make test` fetches it, and so does `apt-get install {package}`"
            )
        return found

    return find
