"""Carries out a Dockerfile's build in a folder, without an engine: COPY, WORKDIR, ENV and RUN.

All stages share one root, which stands for `/`; so `COPY --from` only has to
find its source where an earlier stage has put it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    word: str
    text: str

    @property
    def arguments(self) -> list[str]:
        """The exec form's list, or else the words."""
        start = self.text.find("[")
        if start >= 0 and self.text.endswith("]"):
            return list(json.loads(self.text[start:]))
        return shlex.split(self.text)


def read_dockerfile(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


@dataclass
class Image:
    """What a build has made: files below `root`, and what a container is started with."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)

    def inside(self, text: str) -> str:
        """`text` with the image's absolute paths below `root`."""
        return re.sub(r"(?<![\w.\-/])/(?=opt\b|source\b)", f"{self.root}/", text)

    def process_environment(self, **settings: str) -> dict[str, str]:
        """What a process in a container would see, with `settings` on top."""
        environment = {name: self.inside(value) for name, value in self.environment.items()}
        environment["PATH"] = environment["PATH"].replace("$PATH", os.defpath)
        return environment | settings


def build(dockerfile: Path, root: Path) -> Image:
    """Carry out every stage. Fails with a step's output where it fails."""
    image = Image(root)
    base = root / "base"  # the interpreter that the base image would bring
    subprocess.run([sys.executable, "-m", "venv", base], check=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment["PATH"] = os.pathsep.join([str(base / "bin"), os.environ["PATH"]])
    folder = root
    for step in read_dockerfile(dockerfile):
        if step.word == "FROM":
            folder = root
        elif step.word == "WORKDIR":
            folder = root / step.text.lstrip("/")
            folder.mkdir(parents=True)
        elif step.word == "COPY" and "--from=" in step.text:
            _, source, target = step.arguments
            assert source == target
            assert (root / source.lstrip("/")).exists()
        elif step.word == "COPY":
            _copy(dockerfile.parent, step.arguments[:-1], folder / step.arguments[-1])
        elif step.word == "RUN":
            _run(image.inside(step.text), folder, environment)
        elif step.word == "ENV":
            pairs = (pair.split("=", maxsplit=1) for pair in shlex.split(step.text))
            image.environment.update((name, value) for name, value in pairs)
        elif step.word == "ENTRYPOINT":
            image.entrypoint = step.arguments
        elif step.word == "CMD":
            image.command = step.arguments
        elif step.word == "HEALTHCHECK":
            image.health_check = step.arguments
    return image


def _run(command: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command,
        shell=True,
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def _copy(context: Path, names: list[str], target: Path) -> None:
    for name in names:
        source = context / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
