"""The verdict sees what was lost, doubled, crossed or forked, and nothing where nothing was."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.chaos.journal import Journal
from tests.chaos.reference import Reference
from tests.chaos.verdict import DONE, judge, judge_rivals
from tests.chaos.workload import make_id, read_id

SEQUENCE, OTHER = make_id(1, 0, 0, 0, 40), make_id(1, 0, 1, 0, 40)


@pytest.fixture
def reference(models) -> Reference:
    return Reference(models.lstm)


def outputs(sequence_id: str, reference: Reference) -> NDArray[np.float32]:
    return reference.outputs("accumulator", read_id(sequence_id).inputs())


def put(folder: Path, received: NDArray[np.float32], ending: str = DONE) -> None:
    journal = Journal(folder, SEQUENCE, 1)
    journal.begin()
    for row in received:
        journal.append(row)
    if ending:
        journal.end(ending)


def test_outputs_as_they_should_be_are_counted(reference: Reference, tmp_path: Path) -> None:
    put(tmp_path, outputs(SEQUENCE, reference))
    verdict = judge(tmp_path, reference)
    assert verdict.wrongs == []
    assert verdict.steps == read_id(SEQUENCE).steps


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("lost", [0, 1, 3, 4]),
        ("doubled", [0, 1, 1, 2, 3]),
        ("doubled", [0, 1, 2, 1, 2, 3]),
        ("lost", [1, 0, 2]),
    ],
)
def test_an_output_lost_or_doubled_is_seen(
    kind: str, rows: list[int], reference: Reference, tmp_path: Path
) -> None:
    put(tmp_path, outputs(SEQUENCE, reference)[rows])
    assert judge(tmp_path, reference).kinds == {kind: 1}


def test_an_output_that_is_missing_or_too_many_at_the_end_is_seen(
    reference: Reference, tmp_path: Path
) -> None:
    whole = outputs(SEQUENCE, reference)
    put(tmp_path, whole[:-1])
    assert judge(tmp_path, reference).kinds == {"lost": 1}
    put(tmp_path, np.concatenate([whole[-1:], whole[-1:]]))
    assert judge(tmp_path, reference).kinds == {"doubled": 1}


def test_a_step_of_another_sequence_is_seen(reference: Reference, tmp_path: Path) -> None:
    received = outputs(SEQUENCE, reference)
    crossed = read_id(OTHER).inputs()[3] - read_id(SEQUENCE).inputs()[3]
    received[3:] += crossed
    put(tmp_path, received)
    assert not judge(tmp_path, reference).kinds.keys().isdisjoint({"wrong", "lost", "doubled"})


def test_a_bit_is_seen(reference: Reference, tmp_path: Path) -> None:
    received = outputs(SEQUENCE, reference)
    received.view(np.uint32)[-1] ^= 1
    put(tmp_path, received)
    assert judge(tmp_path, reference).kinds == {"wrong": 1}


def test_a_sequence_that_ends_in_an_error_or_not_at_all_is_seen(
    reference: Reference, tmp_path: Path
) -> None:
    put(tmp_path, outputs(SEQUENCE, reference)[:3], ending="")
    assert judge(tmp_path, reference).kinds == {"unfinished": 1}
    put(tmp_path, np.empty((0, 1), np.float32), ending="Fenced: …")
    assert judge(tmp_path, reference).kinds == {"error": 1}


@pytest.mark.parametrize(
    ("kinds", "first", "second"),
    [
        ({}, [(0, 1), (1, 2)], [(2, 4098), (4, 4100)]),
        ({"doubled": 1}, [(0, 1), (1, 2)], [(1, 4097)]),
        ({"lost": 1}, [(0, 1), (1, 1)], []),
        ({"doubled": 1}, [(0, 2)], []),
        ({"wrong": 1}, [(0, 1), (1, 2), (2, 3)], [(3, 2 * 4096 + 2)]),
    ],
)
def test_a_fork_of_two_rivals_is_seen(
    kinds: dict[str, int],
    first: Sequence[tuple[int, int]],
    second: Sequence[tuple[int, int]],
    tmp_path: Path,
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, claims in zip(folders, (first, second), strict=True):
        folder.mkdir()
        (folder / "claims").write_text("".join(f"{step} {value}\n" for step, value in claims))
    assert judge_rivals(folders).kinds == kinds
