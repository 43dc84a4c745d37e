"""The processes of the harness: started, killed, paused and woken; what they say is kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.chaos.proxy import Proxy
from tests.processes import free_port

# Only bounds a hang: a loaded machine starts a server in many seconds.
START_SECONDS_MAX = 120
STOP_SECONDS_MAX = 120
_STORE_IS_AWAY = "did not answer"


class Process:
    """A program that may be started again and again; its output goes on in one list of lines."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._news = threading.Condition()
        self.lines: list[str] = []

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def is_running(self) -> bool:
        """True between a start and the end."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_halted(self) -> bool:
        """True once it is dead, or stopped by a signal."""
        if not self.is_running:
            return True
        status = Path(f"/proc/{self.pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] in ("T", "Z")

    def start(self) -> None:
        """Run it, from its first line of output on."""
        assert not self.is_running
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def kill(self) -> None:
        """End it by SIGKILL, paused or not, and wait until it is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._wait()

    def stop(self) -> int:
        """End it by SIGTERM; its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._wait()

    def pause(self) -> None:
        """Stop it where it stands, by SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on, by SIGCONT."""
        self._signal(signal.SIGCONT)

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None when it still runs after so many seconds."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def line(self, words: str, *, after: int = 0) -> str:
        """The first line with `words` in it, from line number `after` on; waits for it."""
        deadline = time.monotonic() + START_SECONDS_MAX
        with self._news:
            while True:
                for line in self.lines[after:]:
                    if words in line:
                        return line
                if not self.is_running or time.monotonic() > deadline:
                    said = "".join(self.lines[after:][-40:])
                    raise AssertionError(f"{self._command[:4]} never said {words!r}:\n{said}")
                self._news.wait(0.2)

    def _signal(self, number: int) -> None:
        if self.is_running:
            os.kill(self.pid, number)

    def _wait(self) -> int:
        if self._process is None:
            return 0
        code = self._process.wait(STOP_SECONDS_MAX)
        assert self._reader is not None
        self._reader.join(STOP_SECONDS_MAX)
        return code

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                with self._news:
                    self.lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()


class ServerProcess(Process):
    """`sluice serve` behind a proxy, at whose address it is found however often it starts."""

    def __init__(
        self,
        models: Mapping[str, Path],
        *flags: str,
        trace: Path | None = None,
        without: str = "",
    ) -> None:
        launcher = [sys.executable, "-m", "tests.chaos.launcher"]
        plain = [str(Path(sys.executable).with_name("sluice"))]
        command = [*(plain if trace is None else launcher), "serve"]
        for name, path in models.items():
            command += ["--model", f"{name}={path}"]
        command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags]
        environment = dict(os.environ)
        if trace is not None:
            environment |= {"CHAOS_TRACE": str(trace), "CHAOS_WITHOUT": without}
        super().__init__(command, environment)
        self.proxy = Proxy()
        self.http = ""

    @property
    def address(self) -> str:
        """Where clients find it."""
        return self.proxy.address

    def start(self) -> None:
        """Start it and wait until it is ready; again, while its store does not answer.

        A server without its store ends; whoever runs it starts it again.
        """
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            self.begin()
            try:
                self.await_ready()
            except AssertionError as error:
                if _STORE_IS_AWAY not in str(error) or time.monotonic() > deadline:
                    raise
                self.kill()
                time.sleep(0.2)
            else:
                return

    def begin(self) -> None:
        """Start it, and do not wait."""
        self._lines_before = len(self.lines)
        super().start()

    def await_ready(self) -> None:
        """Wait until it is ready."""
        # Where it has workers, each of them says so too.
        words = '"workers": ' if "--workers" in self._command else '"ready"'
        ready = json.loads(self.line(words, after=self._lines_before))
        self.http = ready["http"]
        self.proxy.target = ready["listen"]

    def workers(self) -> list[int]:
        """The processes that share its port, where there are several."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(child) for child in children if _is_worker(int(child))]

    def kill(self) -> None:
        """End it by SIGKILL."""
        super().kill()
        self.proxy.target = ""

    def close(self) -> None:
        """End it, and its proxy."""
        self.kill()
        self.proxy.close()


def _is_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class RedisProcess(Process):
    """redis-server behind a proxy, that writes each command to disk before it answers it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        program = shutil.which("redis-server")
        assert program, "there is no redis-server; `make tools` unpacks it"
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        command = [program]
        for name, value in options.items():
            command += [f"--{name}", value]
        super().__init__([*command, *flags])
        self.proxy = Proxy(f"127.0.0.1:{self.port}")

    @property
    def url(self) -> str:
        """Where servers find it."""
        return f"redis://{self.proxy.address}/0"

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        lines = len(self.lines)
        super().start()
        self.line("Ready to accept connections", after=lines)

    def close(self) -> None:
        """End it, and its proxy."""
        self.kill()
        self.proxy.close()
