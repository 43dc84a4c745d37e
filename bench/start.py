"""Compares the start of a server with its three largest imports: `python -m bench.start`."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.models import QUICK_HIDDEN, export_model
from bench.table import Figures, bar, print_table, read_effort

THREE = "import onnxruntime, grpc, numpy"
RATIO_MAX = 2.0
# A library is charged with all imports that it causes first.
LIBRARIES = (
    *("onnxruntime", "grpc_reflection", "grpc", "numpy", "aiohttp", "pydantic", "typer"),
    *("structlog", "prometheus_client", "google.protobuf", "uvloop"),
)
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|( +)(\S+)")


def import_three(environment: dict[str, str]) -> tuple[float, float]:
    """Seconds until the three are imported, and until their process has ended."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", f"{THREE}; print(flush=True)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        imported = time.perf_counter() - begun
    return imported, time.perf_counter() - begun


def start_server(model: Path, environment: dict[str, str], *options: str) -> tuple[float, str]:
    """Seconds until a server of `model` is ready, and its log until then."""
    command = [sys.executable, *options, "-m", "sluice_cli", "serve", "--model", f"m={model}"]
    command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    begun = time.perf_counter()
    said = list[str]()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if '"ready"' in line:
                seconds = time.perf_counter() - begun
                process.kill()
                return seconds, "".join(said)
    raise RuntimeError("the server did not start:\n" + "".join(said))


def split_imports(said: str) -> Counter[str]:
    """Milliseconds of the imports in the output of `-X importtime`, by library."""
    spent = Counter[str]()
    owners = list[str]()  # by depth
    # The output lists an import after those that it has caused.
    for microseconds, indent, module in reversed(_LINE.findall(said)):
        depth = (len(indent) - 1) // 2
        del owners[depth:]
        owner = owners[-1] if owners else ""
        if owner not in LIBRARIES:
            owner = _library(module) or ("Sluice" if module.startswith("sluice_") else owner)
        owners.append(owner)
        spent[owner or "Python itself"] += int(microseconds) / 1000
    return spent


def _library(module: str) -> str:
    """The one of LIBRARIES that a module is part of, or an empty string."""
    # pydantic_settings counts as pydantic.
    found = (name for name in LIBRARIES if f"{module}.".startswith((f"{name}.", f"{name}_")))
    return next(found, "")


def _loading(said: str) -> float:
    """How many milliseconds it took to load, test and warm up the model."""
    (line,) = (line for line in said.splitlines() if '"model_loaded"' in line)
    return 1000 * float(json.loads(line)["seconds"])


def environment_of_installed(folder: str) -> dict[str, str]:
    """The environment of a process whose modules are compiled, as in an installed package."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, "PYTHONPYCACHEPREFIX": folder}


def print_start(figures: Figures) -> None:
    """Print the start compared with the imports of the three."""
    names = {
        "imported": "importing the three",
        "ended": "the same, and the end of its process",
        "ready": "`sluice serve` until ready",
    }
    rows = [
        [
            title,
            f"{1000 * figures.least(name):.0f}",
            f"{1000 * figures.median(name):.0f}",
            f"{figures.least('ready') / figures.least(name):.2f}",
            f"{figures.ratio('ready', name):.2f}",
            f"≤ {RATIO_MAX:g}" if name == "ended" else "",
        ]
        for name, title in names.items()
    ]
    columns = ["", "least, ms", "median, ms", "ready ÷ this (least)", "(median)", "target"]
    print_table(f"Start, one model (H={QUICK_HIDDEN})", columns, rows)


def print_parts(said: list[str]) -> None:
    """Print what the fastest start imports."""
    parts = min(map(split_imports, said), key=lambda parts: sum(parts.values()))
    total = sum(parts.values())
    rows = [
        [name, f"{spent:.0f}", f"{100 * spent / total:.0f} %"]
        for name, spent in parts.most_common()
    ]
    rows.append(["(the model, in a thread)", f"{min(map(_loading, said)):.0f}", ""])
    print_table("Imports of a start, by `-X importtime`", ["", "ms", "of all imports"], rows)


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=20)
    model = export_model(QUICK_HIDDEN)
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder, bar() as progress:
        environment = environment_of_installed(folder)
        start_server(model, environment)  # compiles all modules
        for _ in progress.track(range(effort.rounds), description="start"):
            imported, ended = import_three(environment)
            figures.add("imported", imported)
            figures.add("ended", ended)
            figures.add("ready", start_server(model, environment)[0])
        repeats = effort.pick(full=5, quick=1)
        said = [start_server(model, environment, "-X", "importtime")[1] for _ in range(repeats)]
    print_start(figures)
    print_parts(said)


if __name__ == "__main__":
    main()
