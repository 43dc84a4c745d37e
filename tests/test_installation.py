"""The tests run the code they are meant to run."""

import importlib.metadata
import importlib.util
import sysconfig
from pathlib import Path

import pytest

FOLDERS = ("protos", "model", "service", "export", "client", "cli")
ROOT = Path(__file__).parents[1]
IS_CHECKOUT = (ROOT / "protos").is_dir()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tests_run_the_checkout_beside_them_or_else_the_installed_wheel(folder: str) -> None:
    package = f"sluice_{folder}"
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    expected = ROOT / folder if IS_CHECKOUT else Path(sysconfig.get_path("purelib"))
    assert Path(spec.origin) == expected / package / "__init__.py"


def test_the_installation_has_the_types_with_it() -> None:
    for folder in FOLDERS:
        spec = importlib.util.find_spec(f"sluice_{folder}")
        assert spec is not None and spec.origin is not None
        assert Path(spec.origin).with_name("py.typed").is_file()


def test_the_base_install_needs_neither_torch_nor_onnxruntime() -> None:
    requirements = importlib.metadata.requires("sluice-serving") or []
    base = [line for line in requirements if "extra ==" not in line]
    assert base
    assert not [line for line in base if line.startswith(("torch", "onnx"))]
