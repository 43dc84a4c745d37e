"""Measures mixtures of short and long chunks: `python -m bench.ragged`."""

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict

from bench.frames import Order
from bench.models import INPUTS, QUICK_HIDDEN, export_model
from bench.processes import Asked, Server, asked, sluice
from bench.table import Effort, Figures, bar, print_table, read_effort
from sluice_cli.bench.plan import Plan, Sizes
from sluice_cli.bench.run import run_load

HIDDEN = (128, 512)
SEQUENCES = 256
MIX, EQUAL = "1:90,64:10", "64"
# Sequences that push chunks of that many steps while single steps are measured.
PUSHERS, PUSHED = 4, "10000"
SINGLES, SINGLES_RATE = 16, 500.0


def read_counts(server: Server, model: str) -> tuple[float, float]:
    """Steps applied, and padding steps computed, since the server started."""
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=5) as response:
        page = response.read().decode()
    pattern = rf'^sluice_(steps|padding_steps)_total{{model="{model}"}} (\S+)$'
    found = dict(re.findall(pattern, page, re.MULTILINE))
    return float(found["steps"]), float(found["padding_steps"])


def measure_mix(client: Asked, sizes: str, effort: Effort) -> dict[str, float]:
    """Steps per second and CPU per step, with one chunk of every sequence in flight."""
    order = Order(in_flight=SEQUENCES, sizes=sizes, seconds=effort.seconds)
    return client.ask(asdict(order))


def measure_singles(server: Server, model: str, effort: Effort) -> float:
    """The p99, in ms, of single steps that are due at a low rate."""
    plan = Plan(
        model=model,
        addresses=(server.address,),
        sequences=SINGLES,
        in_flight=SINGLES,
        streams=1,
        processes=1,
        sizes=Sizes((1,), (1.0,)),
        rate=SINGLES_RATE,
        warmup=0.3,
        duration=2 * effort.seconds,
        kept_steps=0,
    )
    return run_load(plan).tally.of_chunks()["p99"]


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    hiddens = effort.pick(full=HIDDEN, quick=(QUICK_HIDDEN,))
    figures = Figures()
    with ExitStack() as stack:
        server = stack.enter_context(sluice({f"h{one}": export_model(one) for one in hiddens}))
        clients: dict[int, Asked] = {}
        pushers: dict[int, Asked] = {}
        for hidden in hiddens:
            for kept, sequences in ((clients, SEQUENCES), (pushers, PUSHERS)):
                arguments = (server.address, server.pid, f"h{hidden}", INPUTS)
                kept[hidden] = stack.enter_context(asked("bench.frames", *arguments))
                kept[hidden].ask(asdict(Order(opens=sequences)))
        threads = stack.enter_context(ThreadPoolExecutor())
        progress = stack.enter_context(bar())
        for _ in progress.track(range(effort.rounds), description="ragged"):
            for hidden in hiddens:
                model = f"h{hidden}"
                equal = measure_mix(clients[hidden], EQUAL, effort)
                before = read_counts(server, model)
                mixed = measure_mix(clients[hidden], MIX, effort)
                after = read_counts(server, model)
                useful, vain = after[0] - before[0], after[1] - before[1]
                figures.add(f"useful {hidden}", useful / (useful + vain))
                for name, figure in (("equal", equal), ("mixed", mixed)):
                    figures.add(f"{name} rate {hidden}", figure["steps_per_second"])
                    figures.add(f"{name} cpu {hidden}", figure["cpu_us"])
                figures.add(f"alone {hidden}", measure_singles(server, model, effort))
                order = Order(in_flight=PUSHERS, sizes=PUSHED, seconds=2 * effort.seconds + 2)
                pushing = threads.submit(pushers[hidden].ask, asdict(order))
                figures.add(f"pushed {hidden}", measure_singles(server, model, effort))
                pushing.result()
    print_mix(figures, hiddens)
    print_singles(figures, hiddens)


def print_mix(figures: Figures, hiddens: tuple[int, ...]) -> None:
    """Print what a mixture costs."""
    rows = [
        [
            f"H={hidden}",
            f"{figures.median(f'useful {hidden}'):.3f}",
            f"{figures.median(f'equal rate {hidden}'):,.0f}",
            f"{figures.median(f'mixed rate {hidden}'):,.0f}",
            f"{figures.ratio(f'mixed rate {hidden}', f'equal rate {hidden}'):.2f}",
            f"{figures.least(f'equal cpu {hidden}'):.2f}",
            f"{figures.least(f'mixed cpu {hidden}'):.2f}",
        ]
        for hidden in hiddens
    ]
    print_table(
        f"Ragged: {SEQUENCES} sequences, chunks {MIX}, beside chunks of {EQUAL}",
        [
            "",
            "useful ÷ computed (≥ 0.9)",
            "equal, steps/s",
            "mixed, steps/s",
            "ratio (≥ 0.9)",
            "equal, CPU µs a step",
            "mixed, CPU µs a step",
        ],
        rows,
    )


def print_singles(figures: Figures, hiddens: tuple[int, ...]) -> None:
    """Print what long chunks do to single steps."""
    rows = [
        [
            f"H={hidden}",
            f"{figures.median(f'alone {hidden}'):.2f}",
            f"{figures.median(f'pushed {hidden}'):.2f}",
            f"{figures.ratio(f'pushed {hidden}', f'alone {hidden}'):.2f}",
            "≤ 2",
        ]
        for hidden in hiddens
    ]
    print_table(
        f"p99 of single steps, {SINGLES_RATE:.0f} a second, in ms, beside {PUSHERS} sequences "
        f"that push chunks of {PUSHED}",
        ["", "alone", "beside them", "ratio", "target"],
        rows,
    )


if __name__ == "__main__":
    main()
