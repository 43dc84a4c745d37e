"""Compares steps per CPU second with the usual gRPC servers: `python -m bench.rivals`."""

from contextlib import ExitStack
from dataclasses import asdict, replace

from bench.bare import load
from bench.models import INPUTS, QUICK_HIDDEN, export_model
from bench.overhead import measure_server
from bench.pingpong import Question, ask_sluice, make_step
from bench.processes import Asked, Server, asked, rival, sluice
from bench.table import Effort, Figures, bar, print_table, read_effort

HIDDEN = (128, 512)
SEQUENCES = (1, 256)
# How many messages of a rival are in flight; the best result counts.
CONCURRENCIES = (4, 32, 256)
NAMES = {
    "frames": "Sluice, in frames",
    "streams": "Sluice, one stream a sequence",
    "stream asyncio": "asyncio, a stream a client, dict of states",
    "step asyncio": "asyncio, a call a step, dict of states",
    "stateless asyncio": "asyncio, a call a step, state sent by the client",
    "step threads": "threads, a call a step, dict of states",
    "stateless threads": "threads, a call a step, state sent by the client",
}


def rival_question(name: str, server: Server, state_bytes: int, sequences: int) -> Question:
    """The question to a rival, without the number of streams."""
    way = name.split(maxsplit=1)[0]
    step = make_step(INPUTS)
    message = bytes(state_bytes) + step if way == "stateless" else step
    return Question(
        server.address,
        server.pid,
        f"/plain.Plain/{way.capitalize()}",
        message.hex(),
        is_unary=way != "stream",
        sequences=0 if way == "stateless" else sequences,
    )


def measure_rival(client: Asked, question: Question, sequences: int, effort: Effort) -> float:
    """Steps per CPU second of the server, at its best concurrency."""
    found = []
    for concurrency in effort.pick(full=CONCURRENCIES, quick=CONCURRENCIES[-1:]):
        streams = min(concurrency, sequences)
        asking = replace(question, streams=streams, connections=min(streams, 16))
        answer = client.ask(asdict(replace(asking, seconds=effort.seconds)))
        found.append(1e6 / float(answer["server_cpu"]))
        if streams == sequences:
            break
    return max(found)


def measure_streams(client: Asked, server: Server, sequences: int, effort: Effort) -> float:
    """Steps per CPU second of a Sluice server, with one message per step."""
    question = replace(ask_sluice(server, "m", make_step(INPUTS)), streams=sequences)
    asking = replace(question, connections=min(sequences, 16), seconds=effort.seconds)
    return 1e6 / float(client.ask(asdict(asking))["server_cpu"])


def measure(
    hidden: int, names: list[str], counts: tuple[int, ...], figures: Figures, effort: Effort
) -> None:
    """Measure all servers alternately with one model."""
    model = export_model(hidden)
    (state,) = (value for value in load(str(model)).get_inputs() if value.name == "state")
    with ExitStack() as stack:
        client = stack.enter_context(asked("bench.pingpong"))
        server = stack.enter_context(sluice({"m": model}))
        kinds = dict.fromkeys(name.split()[1] for name in names if " " in name)
        servers = {kind: stack.enter_context(rival("bench.plain", model, kind)) for kind in kinds}
        progress = stack.enter_context(bar())
        rounds = [
            (sequences, name)
            for _ in range(effort.rounds)
            for sequences in counts
            for name in names
        ]
        for sequences, name in progress.track(rounds, description=f"rivals, H={hidden}"):
            if name == "frames":
                figure = 1e6 / measure_server(server, "m", sequences, effort.seconds)
            elif name == "streams":
                figure = measure_streams(client, server, sequences, effort)
            else:
                question = rival_question(
                    name, servers[name.split()[1]], 4 * state.shape[1], sequences
                )
                figure = measure_rival(client, question, sequences, effort)
            figures.add(f"{name} {hidden} {sequences}", figure)


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=2, seconds=1.0)
    figures = Figures()
    names = effort.pick(full=list(NAMES), quick=list(NAMES)[:3])
    counts = effort.pick(full=SEQUENCES, quick=SEQUENCES, smoke=SEQUENCES[:1])
    for hidden in effort.pick(full=HIDDEN, quick=(QUICK_HIDDEN,)):
        measure(hidden, names, counts, figures, effort)
        for sequences in counts:
            case = f"{hidden} {sequences}"
            rows = [
                [
                    NAMES[name],
                    f"{figures.median(f'{name} {case}'):,.0f}",
                    f"{figures.ratio(f'frames {case}', f'{name} {case}'):.2f}",
                    f"{figures.ratio(f'streams {case}', f'{name} {case}'):.2f}",
                ]
                for name in names
            ]
            target = "≥ 10 in frames" if sequences > 1 else "≥ 1"
            print_table(
                f"Steps per CPU second of the server, H={hidden}, {sequences} sequences "
                f"(target: {target})",
                ["", "steps", "frames ÷ this", "streams ÷ this"],
                rows,
            )


if __name__ == "__main__":
    main()
