"""Ten minutes at full load, of all that lives and dies in real use: `python -m bench.soak`.

`--minutes 2` for a shorter one; it can still tell a leak of a megabyte a minute.
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
# What is left alone is gone soon, and forgotten soon after.
FLAGS = ("--sequence-idle-seconds-max", "5", "--tombstone-seconds", "10")
# What a run in progress takes comes and goes. What stays is the least of so many samples.
SAMPLE_SECONDS = 0.1
FLOOR_SAMPLES = 50
# Of a whole run: what is filled on the way (caches, tables that double) is no leak.
WARMUP = 0.2
# What may be noise: a tenth of a percent of the server's memory.
FLAT_KIB_A_MINUTE = 128.0


@dataclass(frozen=True)
class Sample:
    """The server's memory at an instant."""

    seconds: float
    resident_bytes: int


@dataclass(frozen=True)
class Part:
    """What came of one part of the run: answers of the clients."""

    frames: dict[str, Any]
    single: dict[str, Any]
    lives: dict[str, int]


class Sampler:
    """Reads a server's memory again and again, and keeps the least of each few seconds."""

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


def soak(seconds: float, parts: int) -> tuple[list[Sample], list[Part]]:
    """Run all clients for so long, in so many parts."""
    each = seconds / parts
    found: list[Part] = []
    with ExitStack() as stack:
        server = stack.enter_context(sluice({"m": export_model(HIDDEN)}, *FLAGS))
        arguments = (server.address, server.pid, "m", INPUTS)
        framer = stack.enter_context(asked("bench.frames", *arguments))
        pinger = stack.enter_context(asked("bench.pingpong"))
        liver = stack.enter_context(asked("bench.lives", server.address, "m", INPUTS))
        framer.ask(asdict(frames.Order(opens=SEQUENCES)))
        threads = stack.enter_context(ThreadPoolExecutor())
        load = asdict(frames.Order(in_flight=SEQUENCES, sizes=SIZES, seconds=each))
        single = asdict(replace(ask_sluice(server, "m", make_step(INPUTS)), seconds=each))
        living = asdict(lives.Order(each))
        progress = stack.enter_context(bar())
        sampler = stack.enter_context(Sampler(server))
        for _ in progress.track(range(parts), description="soak"):
            asking = [
                threads.submit(client.ask, order)
                for client, order in ((framer, load), (pinger, single), (liver, living))
            ]
            found.append(Part(*(answer.result() for answer in asking)))
    return sampler.samples, found


def fit(samples: list[Sample], after: float) -> float:
    """Bytes a second: the least squares of the samples `after` so many seconds."""
    late = [sample for sample in samples if sample.seconds >= after]
    slope, _ = np.polyfit(
        [sample.seconds for sample in late], [sample.resident_bytes for sample in late], 1
    )
    return float(slope)


def mean_between(samples: list[Sample], begin: float, end: float) -> float:
    """The memory, in MB, in one part of a run."""
    chosen = [one.resident_bytes for one in samples if begin <= one.seconds < end]
    return float(np.mean(chosen or [samples[-1].resident_bytes])) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds, to see it work")
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args()
    parts = 2 if given.quick else max(5, round(given.minutes))
    samples, found = soak(8.0 if given.quick else 60 * given.minutes, parts)
    print_parts(samples, found)
    print_memory(samples)
    print_lives(found)


def print_parts(samples: list[Sample], parts: list[Part]) -> None:
    """How it went, minute by minute."""
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


def print_memory(samples: list[Sample]) -> None:
    """Whether memory grows."""
    warm = WARMUP * samples[-1].seconds
    slope = 60 * fit(samples, warm) / 1024
    late = [sample.resident_bytes / 1e6 for sample in samples if sample.seconds >= warm]
    rows = [
        [f"MB after {warm / 60:.1f} minutes", f"{late[0]:.1f}", ""],
        [f"MB after {samples[-1].seconds / 60:.1f} minutes", f"{late[-1]:.1f}", ""],
        ["least and most MB between them", f"{min(late):.1f} to {max(late):.1f}", ""],
        [
            "slope, KiB a minute",
            f"{slope:+,.0f}",
            f"≤ {FLAT_KIB_A_MINUTE:.0f}",
        ],
        ["verdict", "flat" if slope <= FLAT_KIB_A_MINUTE else "it grows", "flat"],
    ]
    print_table("Memory", ["", "measured", "target"], rows)


def print_lives(parts: list[Part]) -> None:
    """How often everything was lived."""
    rows = [[name, f"{sum(part.lives[name] for part in parts):,}"] for name in parts[0].lives]
    print_table("Lives", ["", "times"], rows)


if __name__ == "__main__":
    main()
