"""Imports point one way: between the folders, inside the service, and at the libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

MAY_IMPORT = {
    "sluice_protos": set(),
    "sluice_model": {"sluice_protos"},
    "sluice_service": {"sluice_protos", "sluice_model"},
    "sluice_export": {"sluice_protos", "sluice_model"},
    "sluice_client": {"sluice_protos"},
    "sluice_cli": {
        "sluice_protos",
        "sluice_model",
        "sluice_service",
        "sluice_export",
        "sluice_client",
    },
}

# Inside a package a module imports only from the lines above its own. A name is a module
# or a package directly below; a package may have a table of its own.
LAYERS = {
    "sluice_service": (
        ("errors", "settings", "arrays", "metrics"),
        ("runtime", "logs"),
        ("store",),
        ("sequences",),
        ("batching",),
        ("serving",),
        ("durability",),
        ("models",),
        ("rpc", "pages"),
        ("server",),
        ("workers",),
    ),
    "sluice_service.sequences": (
        ("states", "lifecycle"),
        ("events", "tombstones"),
        ("stream", "table"),
    ),
    "sluice_service.batching": (
        ("inputs", "arrivals"),
        ("queues", "run"),
        ("direct", "engine"),
        ("scheduler", "versions"),
    ),
    "sluice_service.serving": (
        ("faults", "admission"),
        ("outputs",),
        ("attachments",),
        ("placement", "landing"),
        ("opening", "run_loop"),
        ("intake",),
    ),
    "sluice_service.durability": (
        ("pending", "snapshots"),
        ("ownership",),
        ("checkpointer",),
        ("assembly",),
    ),
    "sluice_service.models": (
        ("queries", "expiry"),
        ("commands",),
        ("host",),
        ("registry",),
        ("repository",),
    ),
    "sluice_export": (
        ("errors", "graphs", "source_lines"),
        ("contract",),
        ("proof",),
        ("onnx", "torch"),
        ("exporter", "verification"),
    ),
    "sluice_client": (
        ("errors", "arguments"),
        ("protocol",),
        ("transport",),
        ("faces", "handles", "load"),
        ("client", "async_client"),
    ),
    "sluice_client.protocol": (
        ("tables", "columns", "signature", "tickets"),
        ("calls", "openings"),
        ("lane", "acknowledgements", "replay_buffer"),
        ("frames",),
        ("send_queue", "messages"),
        ("steps",),
        ("resume", "lifecycle"),
        ("notices",),
        ("connection",),
    ),
    "sluice_client.transport": (
        ("channel", "retry", "questions"),
        ("route",),
        ("stream",),
        ("thread_stream", "async_stream"),
    ),
}

# The reference of demo and bench: it may call ONNX Runtime because it imports nothing of ours.
REFERENCE = "sluice_cli.offline"

ONLY_HERE = {
    # What goes over the wire is put there in one place; the core speaks in plain values.
    "sluice_protos.sequences_pb2": (
        "sluice_service.rpc",
        "sluice_service.server",
        "sluice_client",
        "sluice_cli",
    ),
    "sluice_protos.open_inference_pb2": ("sluice_service.rpc", "sluice_service.server"),
    "onnxruntime": ("sluice_model", REFERENCE),
    "prometheus_client": ("sluice_service.metrics",),
    "torch": (
        "sluice_export.torch",
        "sluice_export.exporter",
        "sluice_export.verification",
        "sluice_cli.demo.training",
    ),
    "onnxscript": ("sluice_export",),
    "aiohttp": ("sluice_service",),
}


def imports(path: Path) -> Iterator[str]:
    """Each dotted name that the file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_every_folder_imports_only_from_the_folders_below_it(modules: dict[str, Path]) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules.items()
        for name in imports(path)
        if (package := name.split(".")[0]).startswith("sluice_")
        and package != (own := module.split(".")[0])
        and package not in MAY_IMPORT[own]
    ]
    assert wrong == []


def test_every_package_has_its_rule(modules: dict[str, Path]) -> None:
    assert {module.split(".")[0] for module in modules} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", LAYERS)
def test_imports_inside_a_package_point_one_way(package: str, modules: dict[str, Path]) -> None:
    layers = LAYERS[package]
    depth_of = {name: depth for depth, layer in enumerate(layers) for name in layer}
    wrong = []
    for module, path in modules.items():
        if not module.startswith(f"{package}."):
            continue
        own = module.removeprefix(f"{package}.").split(".")[0]
        assert own in depth_of, f"{module} has no place in the layers of {package}"
        for name in imports(path):
            other = name.removeprefix(f"{package}.").split(".")[0]
            if not name.startswith(f"{package}.") or other == own:
                continue
            # What is no layer is a name of the package itself, which is above all layers.
            if depth_of.get(other, len(layers)) >= depth_of[own]:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle(modules: dict[str, Path]) -> None:
    graph = {
        module: {name for name in imports(path) if name in modules and name != module}
        for module, path in modules.items()
    }
    # `from package import module` names both; what a package's face hands on is no circle.
    for module, names in graph.items():
        graph[module] = {name for name in names if not is_within(module, name)}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("library", ONLY_HERE)
def test_a_library_is_imported_only_where_it_belongs(
    library: str, modules: dict[str, Path]
) -> None:
    importers = {
        module
        for module, path in modules.items()
        if any(is_within(name, library) for name in imports(path))
    }
    strangers = {
        module
        for module in importers
        if not any(is_within(module, place) for place in ONLY_HERE[library])
    }
    assert strangers == set()


def test_the_reference_of_demo_and_bench_imports_nothing_of_ours(modules: dict[str, Path]) -> None:
    assert not [name for name in imports(modules[REFERENCE]) if name.startswith("sluice_")]


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        (
            "from sluice_cli.main import make_app; make_app()",
            {"torch", "onnx", "onnxruntime", "aiohttp", "sluice_export"},
        ),
        (
            "import sluice_export",
            {"torch", "onnxscript", "sluice_service", "sluice_client"},
        ),
        ("import sluice_client", {"torch", "onnx", "onnxruntime", "pydantic", "sluice_model"}),
        (
            "import sluice_service.server",
            {"torch", "onnx", "onnxscript", "aiohttp", "sluice_client", "sluice_export"},
        ),
    ],
)
def test_what_a_process_does_not_load(program: str, absent: set[str]) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert absent & set(loaded) == set()
