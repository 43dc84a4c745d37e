"""Reads a server's CPU time and memory, from /proc or from its metrics page."""

import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """CPU seconds of all threads since the process began, and resident bytes."""

    cpu_seconds: float
    resident_bytes: int


Watch = Callable[[], Usage]


def watch_process(pid: int) -> Watch:
    """Read a process's usage from /proc. Raises OSError if it cannot be read."""

    def read() -> Usage:
        # The fields after the command, which is in brackets and may contain anything (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return Usage(ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))

    read()
    return read


def watch_page(address: str) -> Watch:
    """Read a server's usage from its metrics page. Raises OSError if it cannot be read."""

    def read() -> Usage:
        try:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
                page: str = response.read().decode()
            values = dict(
                line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("process_")
            )
            return Usage(
                float(values["process_cpu_seconds_total"]),
                int(float(values["process_resident_memory_bytes"])),
            )
        except KeyError as missing:
            raise OSError(f"http://{address}/metrics has no {missing}") from None
        except (HTTPException, ValueError) as error:
            raise OSError(
                f"http://{address}/metrics is not a page of metrics ({error}); give the HOST:PORT "
                "of the server's --http"
            ) from error

    read()
    return read
