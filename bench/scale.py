"""From a thousand to a hundred thousand live sequences, all active: `python -m bench.scale`."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

from bench.frames import Order
from bench.models import INPUTS, LAYERS, export_model
from bench.pingpong import ask_sluice, make_step
from bench.processes import Asked, Server, asked, sluice
from bench.table import Effort, Figures, bar, print_table, read_effort

HIDDEN = 128
COUNTS = (1_000, 10_000, 100_000)
IN_FLIGHT = 256
# Long enough that nothing expires while it is still to be measured.
SEQUENCES_MAX = COUNTS[-1] + 10
IDLE_SECONDS = 8
WATCH_SECONDS = 2.0


@dataclass(frozen=True)
class Round:
    """What one server was seen to do with so many sequences."""

    open_seconds: float
    steps_per_second: float
    cpu_us: float
    resident_bytes: int
    worst_quiet_ms: float = 0.0
    worst_expiring_ms: float = 0.0


def idle_seconds(effort: Effort) -> float:
    """Long enough that nothing expires while it is still to be measured."""
    return 3 if effort.is_quick else 8


def measure_count(count: int, effort: Effort, *, expires: bool) -> Round:
    """Open, stream through all of them in turns, and perhaps let them expire."""
    flags = ["--sequences-max", str(SEQUENCES_MAX)]
    if expires:
        flags += ["--sequence-idle-seconds-max", str(idle_seconds(effort))]
    with ExitStack() as stack:
        server = stack.enter_context(sluice({"m": export_model(HIDDEN)}, *flags))
        arguments = (server.address, server.pid, "m", INPUTS)
        client = stack.enter_context(asked("bench.frames", *arguments))
        opened = client.ask(asdict(Order(opens=count)))
        # Once through all of them first, so that each has its state in memory.
        passing = count / 40_000
        order = Order(in_flight=min(IN_FLIGHT, count), seconds=passing + effort.seconds)
        streamed = client.ask(asdict(order))
        quiet = expiring = 0.0
        if expires:
            quiet, expiring = watch_expiry(client, server, count, effort)
        return Round(
            opened["seconds"],
            streamed["steps_per_second"],
            streamed["cpu_us"],
            int(streamed["resident_bytes"]),
            quiet,
            expiring,
        )


def watch_expiry(client: Asked, server: Server, count: int, effort: Effort) -> tuple[float, float]:
    """The worst latency of a step, in ms, in a quiet time and while `count` sequences expire."""
    now = time.monotonic()
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor())
        pinger = stack.enter_context(asked("bench.pingpong"))
        expiry = threads.submit(client.ask, asdict(Order(expiries=count)))
        question = ask_sluice(server, "m", make_step(INPUTS))
        quiet = pinger.ask(
            asdict(replace(question, seconds=min(WATCH_SECONDS, 3 * effort.seconds)))
        )["max"]
        time.sleep(max(0.0, now + idle_seconds(effort) - 2 - time.monotonic()))
        expiring = 0.0
        while not expiry.done():
            answer = pinger.ask(
                asdict(replace(question, seconds=min(WATCH_SECONDS, 3 * effort.seconds)))
            )
            expiring = max(expiring, answer["max"])
    return quiet / 1000, expiring / 1000


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    counts = (1_000, 3_000) if effort.is_quick else COUNTS
    figures = Figures()
    with bar() as progress:
        rounds = [count for _ in range(effort.rounds) for count in counts]
        for count in progress.track(rounds, description="scale"):
            found = asdict(measure_count(count, effort, expires=count == counts[-1]))
            for name, value in found.items():
                figures.add(f"{name} {count}", value)
    print_rates(figures, counts)
    print_lives(figures, counts)


def print_rates(figures: Figures, counts: tuple[int, ...]) -> None:
    """Steps a second over live sequences."""
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
    """What one more sequence costs, and what their end does."""
    few, many = counts[0], counts[-1]
    grown = figures.median(f"resident_bytes {many}") - figures.median(f"resident_bytes {few}")
    state = 4 * 2 * LAYERS * HIDDEN
    slope = grown / (many - few)
    rows = [
        ["bytes of memory a live sequence", f"{slope:,.0f}", f"≤ {state + 1024:,}"],
        ["of these its state", f"{state:,}", ""],
        [
            "worst step in a quiet time, ms",
            f"{figures.median(f'worst_quiet_ms {many}'):.1f}",
            "",
        ],
        [
            f"worst step while {many:,} expire, ms",
            f"{figures.median(f'worst_expiring_ms {many}'):.1f}",
            "≤ 10 more",
        ],
    ]
    print_table("Lives", ["", "measured", "target"], rows)


if __name__ == "__main__":
    main()
