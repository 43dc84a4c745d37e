"""Measures where one process stops scaling, with several runs at once or several threads per run.

`python -m bench.cores`: 256 sequences in frames, one step of each in flight. The servers differ
only in runs and threads.
"""

import os
from contextlib import ExitStack
from dataclasses import asdict

from bench.frames import Order
from bench.models import INPUTS, QUICK_HIDDEN, export_model
from bench.processes import asked, sluice
from bench.table import Figures, bar, print_table, read_effort

HIDDEN = (128, 512)
SEQUENCES = 256


def counts() -> list[int]:
    """1, 2, 4 … up to the number of cores."""
    cores = len(os.sched_getaffinity(0))
    return [count for count in (1, 2, 4, 8, 16, 32) if count <= cores]


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    hiddens = effort.pick(full=HIDDEN, quick=(QUICK_HIDDEN,))
    ways = {f"{count} runs at once": ("--runs-at-once-max", str(count)) for count in counts()}
    ways |= {f"{count} threads a run": ("--run-threads", str(count)) for count in counts()[1:]}
    ways = effort.pick(full=ways, quick=ways, smoke=dict(list(ways.items())[:1]))
    figures = Figures()
    with bar() as progress:
        for hidden in progress.track(hiddens, description="cores"):
            with ExitStack() as stack:
                clients = {}
                for name, flags in ways.items():
                    server = stack.enter_context(sluice({"m": export_model(hidden)}, *flags))
                    arguments = (server.address, server.pid, "m", INPUTS)
                    clients[name] = stack.enter_context(asked("bench.frames", *arguments))
                    clients[name].ask(asdict(Order(opens=SEQUENCES)))
                for _ in range(effort.rounds):
                    for name, client in clients.items():
                        order = Order(in_flight=SEQUENCES, sizes="1", seconds=effort.seconds)
                        answer = client.ask(asdict(order))
                        figures.add(f"rate {hidden} {name}", answer["steps_per_second"])
                        figures.add(f"cpu {hidden} {name}", answer["cpu_us"])
    first = next(iter(ways))
    rows = [
        [
            f"H={hidden}, {name}",
            f"{figures.median(f'rate {hidden} {name}'):,.0f}",
            f"{figures.ratio(f'rate {hidden} {name}', f'rate {hidden} {first}'):.2f}",
            f"{figures.least(f'cpu {hidden} {name}'):.2f}",
        ]
        for hidden in hiddens
        for name in ways
    ]
    print_table(
        f"Cores: {SEQUENCES} sequences in one process, {len(os.sched_getaffinity(0))} cores "
        "shared with the client",
        ["", "steps/s", "of one run at once", "CPU µs a step"],
        rows,
    )


if __name__ == "__main__":
    main()
