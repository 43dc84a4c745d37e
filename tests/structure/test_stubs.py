"""The committed stubs are what `make protos` would write."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_stubs_are_fresh(root: Path, tmp_path: Path) -> None:
    outputs = [
        f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")
    ]
    sources = sorted((root / "protos" / "sluice_protos").glob("*.proto"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{root / 'protos'}", *outputs]
        + [str(source) for source in sources],
        check=True,
        env={**os.environ, "PATH": path},
    )
    fresh = {file.name: file.read_bytes() for file in (tmp_path / "sluice_protos").iterdir()}
    committed = {
        file.name: file.read_bytes() for file in (root / "protos" / "sluice_protos").glob("*_pb2*")
    }
    assert fresh.keys() == committed.keys(), "run `make protos`"
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert stale == [], "run `make protos`"
