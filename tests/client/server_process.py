"""A Sluice server in a process of its own, as users run it."""

import json
import subprocess
import sys
from pathlib import Path


class ServerProcess:
    """`sluice serve` on ports of its own; ready when made."""

    def __init__(self, models: dict[str, Path], *flags: str) -> None:
        command = [str(Path(sys.executable).with_name("sluice")), "serve"]
        for name, path in models.items():
            command += ["--model", f"{name}={path}"]
        command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.append(line)
            if '"ready"' in line:
                self.address = json.loads(line)["listen"]
                return
        raise AssertionError("".join(lines))

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=30)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)
