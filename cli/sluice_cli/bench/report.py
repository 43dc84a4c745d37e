"""Reports what a load measured: as a table for people, as one object for programs."""

from typing import Any

from rich.table import Table

from sluice_cli.bench.run import Result
from sluice_cli.bench.tally import QUANTILES

# If the generator's own delay exceeds this share of the latency, the latency is unreliable.
_LATE_SHARE_MAX = 0.25


def as_object(result: Result, verified_steps: int) -> dict[str, Any]:
    """All figures; those of the server are null if its usage was not read."""
    plan, tally = result.plan, result.tally
    cpu = result.server_cpu_per_step
    return {
        "model": plan.model,
        "sequences": plan.sequences,
        "streams": plan.streams,
        "steps_per_second": round(result.steps_per_second, 1),
        "latency_ms": _rounded(tally.of_steps()),
        "chunk_latency_ms": _rounded(tally.of_chunks()),
        "chunk_latency_ms_by_steps": {
            str(steps): _rounded(tally.of_chunks(steps)) for steps in plan.sizes.steps
        },
        "server_cpu_us_per_step": None if cpu is None else round(cpu, 3),
        "server_rss_bytes": result.usage and result.usage[1].resident_bytes,
        "verified_steps": verified_steps,
        "unanswered_chunks": tally.unanswered,
        "generator_late_ms": round(tally.generator_late(), 4),
        "open_seconds": round(result.open_seconds, 3),
        "seconds": plan.duration,
    }


def as_table(result: Result) -> Table:
    """Latencies, of steps and of chunks."""
    plan, tally = result.plan, result.tally
    table = Table()
    table.add_column("latency, ms")
    for name in QUANTILES:
        table.add_column(_percent(name), justify="right")
    rows = {"of a step": tally.of_steps(), "of a chunk": tally.of_chunks()}
    if not plan.sizes.is_fixed:
        rows |= {f"of a chunk of {steps}": tally.of_chunks(steps) for steps in plan.sizes.steps}
    for name, values in rows.items():
        table.add_row(name, *(f"{value:,.3f}" for value in values.values()))
    return table


def notes(result: Result) -> list[str]:
    """Sentences for below the table: the server's usage, and warnings."""
    tally, said = result.tally, []
    if result.usage is not None:
        cpu, usage = result.server_cpu_per_step or 0.0, result.usage
        busy = (usage[1].cpu_seconds - usage[0].cpu_seconds) / result.plan.duration
        said.append(
            f"Server: {cpu:,.2f} µs of CPU a step ({busy:.0%} of one core), "
            f"{usage[1].resident_bytes / 1e6:,.1f} MB resident."
        )
    if tally.unanswered:
        said.append(
            f"{tally.unanswered:,} chunks were not answered in time; their latencies are counted "
            "up to the end. The rate is too high for the server, or for this generator."
        )
    late = tally.generator_late()
    if late > _LATE_SHARE_MAX * tally.of_chunks()["p99"]:
        said.append(
            f"This generator was up to {late:,.3f} ms late (p99); latencies include this delay. "
            "Use more --processes or fewer steps a second to measure the server alone."
        )
    return said


def headline(result: Result) -> str:
    """The result in one line."""
    plan = result.plan
    streams = "1 stream" if plan.streams == 1 else f"{plan.streams:,} streams"
    return (
        f"{plan.model}: {result.steps_per_second:,.0f} steps a second, "
        f"{plan.sequences:,} sequences on {streams}"
    )


def _percent(name: str) -> str:
    return "p99.9" if name == "p999" else name


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
