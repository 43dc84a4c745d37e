"""Where the checkout is, and what its own Python files are."""

from pathlib import Path

import pytest

SOURCES = ("protos", "model", "service", "export", "client", "cli")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def modules(root: Path) -> dict[str, Path]:
    """Every module of ours that is written by hand: dotted name to file."""
    files = {}
    for folder in SOURCES:
        for path in sorted((root / folder / f"sluice_{folder}").rglob("*.py")):
            if "_pb2" not in path.name:
                name = ".".join(path.relative_to(root / folder).with_suffix("").parts)
                files[name.removesuffix(".__init__")] = path
    return files
