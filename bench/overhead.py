"""Compares server CPU per step with bare ONNX Runtime's: `python -m bench.overhead`."""

from contextlib import ExitStack

from bench.models import QUICK_HIDDEN, export_model
from bench.processes import Asked, Server, asked, sluice
from bench.table import Figures, bar, print_table, read_effort
from sluice_cli.bench.plan import Plan, Sizes
from sluice_cli.bench.run import run_load
from sluice_cli.bench.watched import watch_process

HIDDEN = (128, 512)
SEQUENCES = (1, 16, 64, 256, 1024)
TARGETS = {(128, 256): 1.5, (512, 256): 1.15}


def measure_server(server: Server, model: str, sequences: int, seconds: float) -> float:
    """Server CPU per step in µs. All sequences are on one stream, with one step in flight each."""
    plan = Plan(
        model=model,
        addresses=(server.address,),
        sequences=sequences,
        in_flight=sequences,
        streams=1,
        processes=1,
        sizes=Sizes((1,), (1.0,)),
        rate=None,
        warmup=0.3,
        duration=seconds,
        kept_steps=0,
    )
    return run_load(plan, watch_process(server.pid)).server_cpu_per_step or 0.0


def measure_bare(bare: Asked, sequences: int, seconds: float) -> float:
    """CPU per step in µs of the bare run at that batch."""
    answer = bare.ask({"batch": sequences, "seconds": seconds / 2})
    return float(answer["cpu_us"]) / sequences


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    cases = effort.pick(
        full=[(hidden, sequences) for hidden in HIDDEN for sequences in SEQUENCES],
        quick=[(QUICK_HIDDEN, 1), (QUICK_HIDDEN, 256)],
        smoke=[(QUICK_HIDDEN, 1)],
    )
    models = {hidden: export_model(hidden) for hidden, _ in cases}
    figures = Figures()
    with ExitStack() as stack:
        server = stack.enter_context(sluice({f"h{one}": path for one, path in models.items()}))
        bares = {
            hidden: stack.enter_context(asked("bench.bare", path))
            for hidden, path in models.items()
        }
        progress = stack.enter_context(bar())
        for _ in progress.track(range(effort.rounds), description="overhead"):
            for hidden, sequences in cases:
                name = f"{hidden} {sequences}"
                spent = measure_bare(bares[hidden], sequences, effort.seconds)
                figures.add(f"bare {name}", spent)
                spent = measure_server(server, f"h{hidden}", sequences, effort.seconds)
                figures.add(f"sluice {name}", spent)
    rows = []
    for hidden, sequences in cases:
        bare, ours = f"bare {hidden} {sequences}", f"sluice {hidden} {sequences}"
        target = TARGETS.get((hidden, sequences))
        rows.append(
            [
                f"H={hidden}, {sequences:,} sequences",
                f"{figures.least(bare):.2f}",
                f"{figures.least(ours):.2f}",
                f"{figures.least(ours) / figures.least(bare):.2f}",
                f"{figures.ratio(ours, bare):.2f}",
                f"≤ {target}" if target else "",
            ]
        )
    print_table(
        "Overhead: µs of CPU a step",
        ["", "bare", "Sluice", "ratio (least)", "ratio (median)", "target"],
        rows,
    )


if __name__ == "__main__":
    main()
