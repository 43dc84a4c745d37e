"""The page of a long run says what was found, and the next run takes its place."""

from collections import Counter
from pathlib import Path

from tests.chaos.faults import GAPS
from tests.chaos.report import BEGIN, END, write_report
from tests.chaos.rounds import Result
from tests.chaos.verdict import Verdict


def test_a_report_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nthe last one\n{END}\nafter\n")
    verdict = Verdict(sequences=3, steps=1234)
    verdict.add("lost", "output 3 is lost")
    result = Result(60.0, Counter(["a setting"]), Counter(cut=5), Counter(GAPS), verdict)
    write_report(page, result, seconds=60, seed=7)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "the last one" not in text
    assert "SECONDS=60 SEED=7" in text
    for row in ("| outputs lost | 1 |", "| cut | 5 |", "| a setting | 1 |", f"| {GAPS[0]} | 1 |"):
        assert row in text
