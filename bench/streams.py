"""Compares one message per step, each sequence on its own stream, with an echo of the same bytes:
`python -m bench.streams`.
"""

from contextlib import ExitStack
from dataclasses import asdict, replace

from bench.models import INPUTS, export_model
from bench.pingpong import Question, ask_echo, ask_sluice, make_step, reply_bytes
from bench.processes import Server, asked, rival, sluice
from bench.table import Figures, bar, print_table, read_effort

HIDDEN = 128
# (streams, connections)
CASES = ((1, 1), (16, 16), (64, 64), (64, 1), (256, 256))


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    model = export_model(HIDDEN)
    figures = Figures()
    cases = effort.pick(full=CASES, quick=CASES[:2], smoke=CASES[:1])
    with ExitStack() as stack:
        client = stack.enter_context(asked("bench.pingpong"))
        server = stack.enter_context(sluice({"m": model}))
        echo = stack.enter_context(rival("bench.echo", reply_bytes(HIDDEN)))
        running = stack.enter_context(rival("bench.echo", reply_bytes(HIDDEN), model))
        progress = stack.enter_context(bar())
        for _ in progress.track(range(effort.rounds), description="streams"):
            for streams, connections in cases:
                for name, question in questions(server, echo, running).items():
                    load = replace(
                        question,
                        streams=streams,
                        connections=connections,
                        seconds=effort.seconds,
                    )
                    answer = client.ask(asdict(load))
                    figures.add(f"{name} {streams} {connections}", answer["server_cpu"])
    rows = []
    for streams, connections in cases:
        case = f"{streams} {connections}"
        ours, plain, run = f"sluice {case}", f"echo {case}", f"run {case}"
        rows.append(
            [
                f"{streams} streams, {connections} connections",
                f"{figures.least(plain):.1f}",
                f"{figures.least(run):.1f}",
                f"{figures.least(ours):.1f}",
                f"{figures.least(ours) - figures.least(plain):+.1f}",
                f"{figures.excess(ours, plain):+.1f}",
                "≤ +15" if streams > 1 else "",
            ]
        )
    print_table(
        f"One message a step (H={HIDDEN}): µs of server CPU a message",
        [
            "",
            "echo",
            "echo + bare run a message",
            "Sluice",
            "over echo (least)",
            "over echo (median)",
            "target",
        ],
        rows,
    )


def questions(server: Server, echo: Server, running: Server) -> dict[str, Question]:
    """The question to each server."""
    step = make_step(INPUTS)
    return {
        "echo": ask_echo(echo, step),
        "run": ask_echo(running, step),
        "sluice": ask_sluice(server, "m", step),
    }


if __name__ == "__main__":
    main()
