"""Writes the result of a long run into its page, between two marks."""

from pathlib import Path

from tests.chaos.faults import GAPS
from tests.chaos.rounds import Result

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


def describe(result: Result, *, seconds: float, seed: int) -> str:
    """The result as Markdown."""
    verdict = result.verdict
    lines = [
        f"`make chaos SECONDS={seconds:.0f} SEED={seed}`: {result.rounds.total()} rounds, "
        f"{result.faults.total():,} faults, {verdict.sequences:,} sequences, "
        f"{verdict.steps:,} outputs compared bit for bit.",
        "",
        "| found | count |",
        "|---|---|",
        f"| outputs lost | {verdict.kinds['lost']} |",
        f"| outputs doubled | {verdict.kinds['doubled']} |",
        f"| outputs with other bits | {verdict.kinds['wrong']} |",
        f"| sequences that ended with an error, or not at all | "
        f"{verdict.kinds['error'] + verdict.kinds['unfinished']} |",
        "",
        "| fault | injected |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in sorted(result.faults.items())),
        "",
        "| faults that landed between | count |",
        "|---|---|",
        *(f"| {gap} | {result.landings[gap]} |" for gap in GAPS),
        "",
        "| rounds of | count |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(result.rounds.items())),
    ]
    return "\n".join(lines)


def write_report(page: Path, result: Result, *, seconds: float, seed: int) -> None:
    """Put the result into the page, in place of the last one."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    words = describe(result, seconds=seconds, seed=seed)
    page.write_text(f"{before}{BEGIN}\n{words}\n{END}{after}")
