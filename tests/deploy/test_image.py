"""The image's build steps pass in a clean environment, and what they make serves."""

import fnmatch
import re
import subprocess
from pathlib import Path

from tests.deploy.dockerfile import Image, read_dockerfile
from tests.processes import free_port, running


def copied(root: Path) -> list[str]:
    """Everything the Dockerfile copies from the checkout."""
    steps = read_dockerfile(root / "Dockerfile")
    return [
        name
        for step in steps
        if step.word == "COPY" and "--from=" not in step.text
        for name in step.arguments[:-1]
    ]


def test_everything_the_image_copies_exists_and_is_not_ignored(root: Path) -> None:
    lines = (root / ".dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines
    for name in copied(root):
        assert (root / name).exists(), name
        assert any(fnmatch.fnmatch(name, pattern) for pattern in kept), name


def test_the_image_runs_as_nobody_and_stops_gracefully(root: Path) -> None:
    steps = {step.word: step.text for step in read_dockerfile(root / "Dockerfile")}
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", steps["USER"])
    assert steps["STOPSIGNAL"] == "SIGTERM"


def test_the_image_has_the_server_and_neither_torch_nor_pip(image: Image) -> None:
    program = (
        "import importlib.util as i, sluice_service.server as s; "
        "print(s.__file__, i.find_spec('torch'), i.find_spec('pip'))"
    )
    python = str(image.root / "opt/sluice/bin/python")
    shown = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    file, torch, pip = shown.stdout.split()
    assert Path(file).is_relative_to(image.root)
    assert (torch, pip) == ("None", "None")


def test_the_image_serves_and_its_health_check_tells(image: Image, model_file: Path) -> None:
    port = free_port()
    environment = image.process_environment(
        SLUICE_LISTEN="127.0.0.1:0",
        SLUICE_HTTP=f"127.0.0.1:{port}",
        SLUICE_MODEL=f"lstm={model_file}",
    )

    def is_healthy() -> bool:
        program, *arguments = image.health_check
        command = [str(image.root / "opt/sluice/bin" / program), *arguments]
        shown = subprocess.run(command, env=environment, check=False, capture_output=True)
        return shown.returncode == 0

    assert not is_healthy()
    command = [str(image.root / "opt/sluice/bin" / image.entrypoint[0]), *image.entrypoint[1:]]
    ready = f"http://127.0.0.1:{port}/readyz"
    with running([*command, *image.command], ready=ready, environment=environment) as server:
        assert is_healthy()
    assert server.returncode == 0
    assert not is_healthy()


def test_the_image_names_only_settings_that_exist(image: Image) -> None:
    from sluice_service.settings import Settings

    named = {
        name.removeprefix("SLUICE_").lower()
        for name in image.environment
        if name.startswith("SLUICE_")
    }
    assert named
    assert named <= set(Settings.model_fields)


def test_a_container_without_a_model_says_what_is_missing(image: Image) -> None:
    command = [str(image.root / "opt/sluice/bin" / image.entrypoint[0]), *image.command]
    refused = subprocess.run(
        command, env=image.process_environment(), capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "--model" in refused.stderr + refused.stdout
