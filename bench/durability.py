"""Measures what durability costs, and how soon a sequence resumes: `python -m bench.durability`.

The first table is throughput and latency with each durability over each store, measured
alternately. For the second, servers are killed while a client that knows another one uses them.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bench.models import INPUTS, export_model
from bench.processes import Server, sluice
from bench.stores import redis_server
from bench.table import Effort, Figures, bar, print_table, read_effort
from sluice_client import AsyncClient

HIDDEN = 128
SEQUENCES = 1_000
DURABILITIES = ("periodic", "strict")
KILLS = 20
RECOVERED = 10_000


def flags(durability: str, url: str) -> list[str]:
    """The server's flags."""
    return ["--durability", durability, *(["--store", url] if durability != "off" else [])]


def load(server: Server, sequences: int, seconds: float) -> dict[str, float]:
    """Results of `sluice bench`: steps per second, p99 in ms, CPU µs per step."""
    command = [sys.executable, "-m", "sluice_cli", "bench", "m", "--json"]
    command += ["--address", server.address, "--pid", str(server.pid), "--warmup", "1"]
    command += ["--sequences", str(sequences), "--duration", str(seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return {
        "rate": found["steps_per_second"],
        "p99": found["latency_ms"]["p99"],
        "cpu": found["server_cpu_us_per_step"],
    }


def measure_costs(effort: Effort, stores: dict[str, str], figures: Figures) -> list[str]:
    """One round of every durability over every store. Returns the names of the rows."""
    sequences = effort.pick(full=SEQUENCES, quick=100)
    durabilities = effort.pick(full=DURABILITIES, quick=DURABILITIES, smoke=DURABILITIES[-1:])
    wanted = [("off", "")] + [
        (durability, store) for durability in durabilities for store in stores
    ]
    names = []
    for durability, store in wanted:
        name = f"{durability}, {store}" if store else durability
        names.append(name)
        with sluice(
            {"m": export_model(HIDDEN)}, *flags(durability, stores.get(store, ""))
        ) as server:
            for key, value in load(server, sequences, 2 * effort.seconds).items():
                figures.add(f"{name} {key}", value)
    return names


async def watch_kills(url: str, kills: int) -> list[float]:
    """Milliseconds from the kill of a client's server to its first output from the next one."""
    took = []
    with ExitStack() as stack:
        # The next server is already running when the present one is killed.
        servers = [stack.enter_context(boot(url)) for _ in range(2)]
        for _ in range(kills):
            present, spare = servers
            async with (
                AsyncClient([present.address, spare.address]) as client,
                client.sequence("m") as sequence,
            ):
                for _ in range(5):
                    await sequence.step(np.zeros(INPUTS))
                os.kill(present.pid, signal.SIGKILL)
                begun = time.perf_counter()
                await sequence.step(np.zeros(INPUTS))
                took.append(1e3 * (time.perf_counter() - begun))
            servers = [spare, stack.enter_context(boot(url))]
    return took


def boot(url: str) -> AbstractContextManager[Server]:
    """A strict server over the store at `url`."""
    return sluice({"m": export_model(HIDDEN)}, *flags("strict", url))


async def watch_recovery(url: str, count: int) -> float:
    """Seconds from a kill until every one of `count` sequences has its next output."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(boot(url)) for _ in range(2))
        async with AsyncClient([first.address, second.address]) as client:
            names = [f"recovered-{number}" for number in range(count)]
            async with client.group("m", names) as group:
                x = np.zeros((count, INPUTS))
                (await group.step(x)).check()
                os.kill(first.pid, signal.SIGKILL)
                begun = time.perf_counter()
                (await group.step(x)).check()
                return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    figures = Figures()
    kills, recovered = effort.pick(full=(KILLS, RECOVERED), quick=(1, 100), smoke=(0, 0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        stores = {
            "SQLite": f"sqlite:///{folder}/store.db",
            "Redis": stack.enter_context(redis_server(folder / "redis", "always")),
        }
        stores = effort.pick(full=stores, quick={"SQLite": stores["SQLite"]})
        progress = stack.enter_context(bar())
        names: list[str] = []
        for _ in progress.track(range(effort.rounds), description="cost"):
            names = measure_costs(effort, stores, figures)
        for name, url in progress.track(stores.items() if kills else [], description="kills"):
            for milliseconds in asyncio.run(watch_kills(url, kills)):
                figures.add(f"{name} kill", milliseconds)
            figures.add(f"{name} recovery", asyncio.run(watch_recovery(url, recovered)))
    print_costs(figures, names)
    if kills:
        print_resumes(figures, list(stores), recovered)


def print_costs(figures: Figures, names: list[str]) -> None:
    """Print each durability compared with none."""
    rows = [
        [
            name,
            f"{figures.median(f'{name} rate'):,.0f}",
            f"{figures.ratio(f'{name} rate', 'off rate'):.2f}",
            f"{figures.median(f'{name} p99'):.1f}",
            f"{figures.least(f'{name} cpu'):.2f}",
        ]
        for name in names
    ]
    columns = ["", "steps/s", "of off (periodic ≥ 0.95)", "p99, ms", "CPU µs a step"]
    print_table(f"Durability (H={HIDDEN}): {SEQUENCES:,} live sequences", columns, rows)


def print_resumes(figures: Figures, names: list[str], recovered: int) -> None:
    """Print how soon sequences resume after kill -9."""
    rows = [
        [
            name,
            f"{figures.median(f'{name} kill'):.0f}",
            f"{figures.percentile(f'{name} kill', 99):.0f}",
            f"{figures.median(f'{name} recovery'):.2f}",
        ]
        for name in names
    ]
    columns = ["", "p50, ms (≤ 50)", "p99, ms", f"all of {recovered:,}, s"]
    print_table("From kill -9 to the next output, at another server", columns, rows)


if __name__ == "__main__":
    main()
