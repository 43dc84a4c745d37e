"""Runs all kinds of clients at full load for ten minutes: `python -m bench.soak`.

Before and after, the server comes to rest: it has no clients, and all sequences have expired.
"""

import argparse
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench import frames, lives
from bench.models import INPUTS, export_model
from bench.pingpong import ask_sluice, make_step
from bench.processes import Server, asked, sluice
from bench.table import bar, print_table

HIDDEN = 128
SEQUENCES, SIZES = 256, "1:90,64:10"
# Idle sequences and tombstones expire soon.
FLAGS = ("--sequence-idle-seconds-max", "5", "--tombstone-seconds", "10")
# The memory of a run in progress comes and goes, so take the least of several samples.
SAMPLE_SECONDS = 0.1
FLOOR_SAMPLES = 50
# The share of a run to ignore: free lists and growing tables fill then, which is no leak.
WARMUP = 0.2
# Until everything has expired, is forgotten, and free memory has been given back.
REST_SECONDS = 45.0
# The growth that may be noise.
GROWN_MAX = 0.02


@dataclass(frozen=True)
class Sample:
    """The server's memory at an instant."""

    seconds: float
    resident_bytes: int


@dataclass(frozen=True)
class Part:
    """The clients' results in one part of the run."""

    frames: dict[str, Any]
    single: dict[str, Any]
    lives: dict[str, int]


class Sampler:
    """Reads a server's memory periodically and keeps the least value of every few seconds."""

    def __init__(self, server: Server) -> None:
        self.samples: list[Sample] = []
        self._server = server
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        begun = time.monotonic()
        read = list[int]()
        while not self._is_over.wait(SAMPLE_SECONDS):
            read.append(self._server.usage().resident_bytes)
            if len(read) == FLOOR_SAMPLES:
                self.samples.append(Sample(time.monotonic() - begun, min(read)))
                read.clear()


@dataclass(frozen=True)
class Plan:
    """The duration in seconds of the warm-up, of each part, and of a rest; how many parts."""

    warmup: float
    parts: int
    part: float
    rest: float


@dataclass(frozen=True)
class Found:
    """The results: memory under load by minute, and memory at rest before and after."""

    samples: list[Sample]
    parts: list[Part]
    rested: tuple[int, int]


def soak(plan: Plan) -> Found:
    """Run all clients briefly, then for long, and let the server come to rest after each."""
    with ExitStack() as stack:
        server = stack.enter_context(sluice({"m": export_model(HIDDEN)}, *FLAGS))
        progress = stack.enter_context(bar())
        with _Clients(server) as clients:
            clients.load(plan.warmup)
        before = rest(server, plan.rest)
        parts = list[Part]()
        with _Clients(server) as clients, Sampler(server) as sampler:
            for _ in progress.track(range(plan.parts), description="soak"):
                parts.append(clients.load(plan.part))
        return Found(sampler.samples, parts, (before, rest(server, plan.rest)))


def rest(server: Server, seconds: float) -> int:
    """The server's memory after that long without a client."""
    time.sleep(seconds)
    return server.usage().resident_bytes


class _Clients(ExitStack):
    """All clients of the server. They are killed at the end of the block."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        arguments = (server.address, server.pid, "m", INPUTS)
        self._framer = self.enter_context(asked("bench.frames", *arguments))
        self._pinger = self.enter_context(asked("bench.pingpong"))
        self._liver = self.enter_context(asked("bench.lives", server.address, "m", INPUTS))
        self._threads = self.enter_context(ThreadPoolExecutor())
        self._step = ask_sluice(server, "m", make_step(INPUTS))
        self._framer.ask(asdict(frames.Order(opens=SEQUENCES)))

    def load(self, seconds: float) -> Part:
        """Run all of them for that long."""
        load = frames.Order(in_flight=SEQUENCES, sizes=SIZES, seconds=seconds)
        orders = (
            (self._framer, asdict(load)),
            (self._pinger, asdict(replace(self._step, seconds=seconds))),
            (self._liver, asdict(lives.Order(seconds))),
        )
        asking = [self._threads.submit(client.ask, order) for client, order in orders]
        return Part(*(answer.result() for answer in asking))


def fit(samples: list[Sample], after: float) -> float:
    """The growth in bytes per second: a least-squares fit to the samples after `after` seconds."""
    late = [sample for sample in samples if sample.seconds >= after]
    seconds = np.array([sample.seconds for sample in late])
    seconds -= seconds.mean()
    resident = np.array([sample.resident_bytes for sample in late])
    return float(seconds @ resident / max(seconds @ seconds, 1e-9))


def mean_between(samples: list[Sample], begin: float, end: float) -> float:
    """The mean memory in MB in one part of a run."""
    chosen = [one.resident_bytes for one in samples if begin <= one.seconds < end]
    return float(np.mean(chosen or [samples[-1].resident_bytes])) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="run for seconds, to check that it works"
    )
    parser.add_argument("--minutes", type=int, default=10)
    given = parser.parse_args()
    plan = Plan(60.0, given.minutes, 60.0, REST_SECONDS)
    found = soak(Plan(1.0, 2, 3.0, 1.0) if given.quick else plan)
    print_parts(found.samples, found.parts)
    print_memory(found)
    print_lives(found.parts)


def print_parts(samples: list[Sample], parts: list[Part]) -> None:
    """Print the figures of each minute."""
    ends = np.linspace(0, samples[-1].seconds + 1, len(parts) + 1)
    rows = [
        [
            f"{end / 60:.1f}",
            f"{mean_between(samples, begin, end):.1f}",
            f"{part.frames['steps_per_second']:,.0f}",
            f"{part.single['messages']:,}",
            f"{part.single['p50'] / 1000:.2f}",
            f"{part.single['p99'] / 1000:.1f}",
            f"{part.single['max'] / 1000:.1f}",
        ]
        for (begin, end), part in zip(itertools.pairwise(ends.tolist()), parts, strict=True)
    ]
    print_table(
        f"Soak (H={HIDDEN}): {SEQUENCES} chunks {SIZES} in flight, and all kinds of lives",
        [
            "minute",
            "resident MB",
            "steps/s in frames",
            "single steps",
            "p50, ms",
            "p99, ms",
            "worst, ms",
        ],
        rows,
    )


def print_memory(found: Found) -> None:
    """Print how memory has grown."""
    samples = found.samples
    before, after = (resident / 1e6 for resident in found.rested)
    warm = WARMUP * samples[-1].seconds
    late = [sample.resident_bytes / 1e6 for sample in samples if sample.seconds >= warm]
    rows = [
        ["at rest, before", f"{before:.1f}", ""],
        ["at rest, after", f"{after:.1f}", ""],
        ["grown", f"{after - before:+.1f}", f"≤ {GROWN_MAX * before:.1f}"],
        [f"under load, {warm / 60:.0f} minutes on: least", f"{min(late):.1f}", ""],
        ["under load: most", f"{max(late):.1f}", ""],
        ["under load: slope, a minute", f"{60 * fit(samples, warm) / 1e6:+.2f}", ""],
    ]
    print_table("Resident memory, in MB", ["", "measured", "target"], rows)


def print_lives(parts: list[Part]) -> None:
    """Print how often each kind of client has run."""
    rows = [[name, f"{sum(part.lives[name] for part in parts):,}"] for name in parts[0].lives]
    print_table("Lives", ["", "times"], rows)


if __name__ == "__main__":
    main()
