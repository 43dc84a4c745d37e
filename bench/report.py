"""Runs all the tables and puts them into README.md: `python -m bench.report`.

With names, such as `python -m bench.report overhead latency`, only those.
"""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

README = Path(__file__).with_name("README.md")
TABLES = (
    *("overhead", "rivals", "ragged", "scale", "streams", "latency", "stores"),
    *("durability", "open_inference", "cores", "start"),
)
_PACKAGES = ("onnxruntime", "grpcio", "numpy")


def describe_machine() -> str:
    """The machine on which the figures were measured."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = found[1] if found else platform.machine()
    packages = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    return (
        f"{name}, {os.cpu_count()} virtual cores shared by server and clients, "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, {packages}."
    )


def place(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of that name. Raises ValueError without marks."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{README} has no {begin} … {end}")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def main() -> None:
    """Run the tables one after another. Each is written as soon as it is made."""
    for name in sys.argv[1:] or TABLES:
        if name not in TABLES:
            sys.exit(f"{name!r} is not a table; there are {', '.join(TABLES)}")
        command = [sys.executable, "-m", f"bench.{name}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        table = done.stdout
        print(table, flush=True)
        text = place(README.read_text(), "machine", describe_machine())
        README.write_text(place(text, name, table))


if __name__ == "__main__":
    main()
