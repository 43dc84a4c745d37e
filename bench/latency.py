"""Compares the latency of single steps of one sequence with an echo of the same bytes:
`python -m bench.latency`.
"""

from contextlib import ExitStack
from dataclasses import asdict, replace

from bench.models import QUICK_HIDDEN, export_model
from bench.pingpong import reply_bytes
from bench.processes import asked, rival, sluice
from bench.streams import questions
from bench.table import Figures, bar, print_table, read_effort

HIDDEN = (128, 512)


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=7, seconds=1.0)
    cases = effort.pick(full=HIDDEN, quick=(QUICK_HIDDEN,))
    figures = Figures()
    for hidden in cases:
        model = export_model(hidden)
        with ExitStack() as stack:
            client = stack.enter_context(asked("bench.pingpong"))
            server = stack.enter_context(sluice({"m": model}))
            echo = stack.enter_context(rival("bench.echo", reply_bytes(hidden)))
            running = stack.enter_context(rival("bench.echo", reply_bytes(hidden), model))
            bare = stack.enter_context(asked("bench.bare", model))
            progress = stack.enter_context(bar())
            for _ in progress.track(range(effort.rounds), description=f"latency, H={hidden}"):
                for name, question in questions(server, echo, running).items():
                    answer = client.ask(asdict(replace(question, seconds=effort.seconds)))
                    figures.add(f"{name} {hidden}", answer["p50"])
                    figures.add(f"{name} {hidden} p99", answer["p99"])
                answer = bare.ask({"batch": 1, "seconds": effort.seconds / 4})
                figures.add(f"bare {hidden}", answer["wall_us"])
    rows = []
    for hidden in cases:
        echo_, run = f"echo {hidden}", f"run {hidden}"
        bare_, ours = f"bare {hidden}", f"sluice {hidden}"
        over_bare = figures.excess(ours, echo_) - figures.median(bare_)
        rows.append(
            [
                f"H={hidden}",
                f"{figures.median(echo_):.0f}",
                f"{figures.median(bare_):.0f}",
                f"{figures.median(run):.0f}",
                f"{figures.median(ours):.0f}",
                f"{over_bare:+.0f}",
                f"{figures.excess(ours, run):+.0f}",
                "≤ +40",
                f"{figures.median(run + ' p99'):.0f}",
                f"{figures.median(ours + ' p99'):.0f}",
            ]
        )
    print_table(
        "Latency at low load: µs, one sequence, one step at a time",
        [
            "p50",
            "echo",
            "bare run, hot loop",
            "echo + bare run a message",
            "Sluice",
            "over echo + hot run",
            "over echo that runs",
            "target",
            "p99 of echo that runs",
            "p99 of Sluice",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
