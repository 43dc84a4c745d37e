"""Measures a thousand to a hundred thousand live, active sequences: `python -m bench.scale`."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace

from bench.frames import Order
from bench.models import INPUTS, LAYERS, export_model
from bench.pingpong import ask_sluice, make_step
from bench.processes import Asked, Server, asked, sluice
from bench.table import Effort, Figures, bar, print_table, read_effort

HIDDEN = 128
COUNTS = (1_000, 10_000, 100_000)
IN_FLIGHT = 256
SEQUENCES_MAX = COUNTS[-1] + 10
# How long the watched sequence takes to connect and to reach its pace.
STARTING_SECONDS = 1.0


@dataclass(frozen=True)
class Round:
    """The results of one server with that many sequences."""

    open_seconds: float
    steps_per_second: float
    cpu_us: float
    resident_bytes: int


@dataclass(frozen=True)
class Worst:
    """The worst step in ms of a watched sequence, while many others rest, expire, open or break."""

    quiet: float
    expire: float
    opened: float
    break_off: float


def idle_seconds(effort: Effort) -> float:
    """An idle limit that is long enough for the measurement before it."""
    return effort.pick(full=8, quick=3)


def measure_count(count: int, effort: Effort) -> Round:
    """Open that many sequences and stream through all of them in turn."""
    with ExitStack() as stack:
        server = stack.enter_context(
            sluice({"m": export_model(HIDDEN)}, "--sequences-max", str(SEQUENCES_MAX))
        )
        client = stack.enter_context(_client(server))
        opened = client.ask(asdict(Order(opens=count)))
        streamed = client.ask(asdict(_stream(count, effort)))
        return Round(
            opened["seconds"],
            streamed["steps_per_second"],
            streamed["cpu_us"],
            int(streamed["resident_bytes"]),
        )


def _client(server: Server) -> AbstractContextManager[Asked]:
    return asked("bench.frames", server.address, server.pid, "m", INPUTS)


def _stream(count: int, effort: Effort) -> Order:
    """An order that runs each sequence at least once."""
    passing = count / 40_000
    return Order(in_flight=min(IN_FLIGHT, count), seconds=passing + effort.seconds)


class Watch:
    """A watched sequence that runs step by step and measures the worst step."""

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self._pinger = stack.enter_context(asked("bench.pingpong"))
        self._threads = stack.enter_context(ThreadPoolExecutor())
        self._question = ask_sluice(server, "m", make_step(INPUTS))

    def during(self, work: Callable[[], object], seconds: float) -> float:
        """The worst step in ms during `work`, which takes less than that many seconds."""
        question = asdict(replace(self._question, seconds=seconds))
        answer = self._threads.submit(self._pinger.ask, question)
        time.sleep(STARTING_SECONDS)
        work()
        worst: float = answer.result()["max"]
        return worst / 1000


def watch_lives(count: int, effort: Effort) -> Worst:
    """Measure a watched sequence while `count` others open, expire and break together."""
    idle, model = idle_seconds(effort), {"m": export_model(HIDDEN)}
    seconds = effort.pick(full=12.0, quick=2.0)
    flags = ("--sequences-max", str(SEQUENCES_MAX))
    with ExitStack() as stack:
        server = stack.enter_context(
            sluice(model, *flags, "--sequence-idle-seconds-max", str(idle))
        )
        watch, client = Watch(server, stack), stack.enter_context(_client(server))
        client.ask(asdict(Order(opens=count)))
        client.ask(asdict(_stream(count, effort)))
        since = time.monotonic()
        quiet = watch.during(lambda: None, seconds / 4)
        time.sleep(max(0.0, since + idle - 2 - time.monotonic()))
        expire = watch.during(lambda: client.ask(asdict(Order(expiries=count))), seconds + 2)
    with ExitStack() as stack:
        server = stack.enter_context(sluice(model, *flags))
        watch, client = Watch(server, stack), stack.enter_context(_client(server))
        opened = watch.during(lambda: client.ask(asdict(Order(opens=count))), seconds)
        break_off = watch.during(client.kill, seconds / 4)
    return Worst(quiet, expire, opened, break_off)


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    counts = effort.pick(full=COUNTS, quick=(1_000, 3_000), smoke=COUNTS[:1])
    has_lives = effort.pick(full=True, quick=True, smoke=False)
    figures = Figures()
    with bar() as progress:
        for _ in progress.track(range(effort.rounds), description="scale"):
            for count in counts:
                for name, value in asdict(measure_count(count, effort)).items():
                    figures.add(f"{name} {count}", value)
            if has_lives:
                for name, value in asdict(watch_lives(counts[-1], effort)).items():
                    figures.add(name, value)
    print_rates(figures, counts)
    if has_lives:
        print_lives(figures, counts)


def print_rates(figures: Figures, counts: tuple[int, ...]) -> None:
    """Print steps per second by the number of live sequences."""
    first = f"steps_per_second {counts[0]}"
    rows = [
        [
            f"{count:,}",
            f"{figures.median(f'steps_per_second {count}'):,.0f}",
            f"{figures.ratio(f'steps_per_second {count}', first):.2f}",
            f"{figures.least(f'cpu_us {count}'):.2f}",
            f"{figures.median(f'open_seconds {count}'):.2f}",
            f"{figures.median(f'resident_bytes {count}') / 1e6:.1f}",
        ]
        for count in counts
    ]
    print_table(
        f"Scale (H={HIDDEN}): {IN_FLIGHT} steps in flight, from all live sequences in turns",
        [
            "live sequences",
            "steps/s",
            "ratio (0.85 to 1.15)",
            "CPU µs a step",
            "opened in s (≤ 10)",
            "resident MB",
        ],
        rows,
    )


def print_lives(figures: Figures, counts: tuple[int, ...]) -> None:
    """Print the memory of a sequence, and the worst steps."""
    few, many = counts[0], counts[-1]
    grown = figures.median(f"resident_bytes {many}") - figures.median(f"resident_bytes {few}")
    state = 4 * 2 * LAYERS * HIDDEN
    slope = grown / (many - few)
    rows = [
        ["bytes of memory a live sequence", f"{slope:,.0f}", f"≤ {state + 1024:,}"],
        ["of these its state", f"{state:,}", ""],
        ["worst step in a quiet time, ms", f"{figures.median('quiet'):.1f}", ""],
        *(
            [f"worst step while {many:,} {what}, ms", f"{figures.median(name):.1f}", "≤ 10 more"]
            for name, what in (
                ("expire", "expire"),
                ("opened", "are opened"),
                ("break_off", "lose their stream"),
            )
        ),
    ]
    print_table("Lives", ["", "measured", "target"], rows)


if __name__ == "__main__":
    main()
