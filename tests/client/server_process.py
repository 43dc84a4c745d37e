"""A Sluice server in a process of its own, as users run it."""

import json
import subprocess
import sys
import threading
from pathlib import Path

from tests.processes import free_port


class ServerProcess:
    """`sluice serve` on ports of its own; ready when made."""

    def __init__(self, models: dict[str, Path], *flags: str) -> None:
        command = [str(Path(sys.executable).with_name("sluice")), "serve"]
        for name, path in models.items():
            command += ["--model", f"{name}={path}"]
        # Not a port of the system's choice: after this server another may want the same one.
        command += ["--listen", f"127.0.0.1:{free_port()}", "--http", "127.0.0.1:0", *flags]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.append(line)
            if '"ready"' in line:
                self.address = json.loads(line)["listen"]
                break
        else:
            raise AssertionError("".join(lines))
        # A pipe that nobody reads would stop the server once it is full.
        self._reader = threading.Thread(target=self._process.stdout.read, daemon=True)
        self._reader.start()

    def stop(self) -> None:
        self._process.terminate()
        self._wait()

    def kill(self) -> None:
        self._process.kill()
        self._wait()

    def _wait(self) -> None:
        self._process.wait(30)
        self._reader.join(30)
        self._process.stdout.close()
