"""Holds what was received against what an undisturbed run gives."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.chaos.journal import Journal, sequence_ids
from tests.chaos.reference import Reference
from tests.chaos.workload import OUTPUT_SIZES, read_id

DONE = "done"
# What each of two rivals adds to their sum, and how far sums of both stay exact and apart.
RIVAL_ADDENDS = (1, 4096)
RIVAL_STEPS_MAX = 4000


@dataclass
class Verdict:
    """What was found: with an empty `wrongs`, every output came, once, in order, bit for bit."""

    sequences: int = 0
    steps: int = 0
    wrongs: list[str] = field(default_factory=list)
    # "lost", "doubled", "wrong", "error", "unfinished"
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, words: str) -> None:
        """Note something that must not be."""
        self.kinds[kind] += 1
        self.wrongs.append(words)

    def take(self, other: "Verdict") -> None:
        """Add another verdict to this one."""
        self.sequences += other.sequences
        self.steps += other.steps
        self.wrongs += other.wrongs
        self.kinds += other.kinds


def compare(
    verdict: Verdict,
    sequence_id: str,
    received: NDArray[np.float32],
    expected: NDArray[np.float32],
    *,
    is_whole: bool,
) -> None:
    """Judge the outputs of one sequence, [steps, outputs] each; a part of it unless whole."""
    verdict.sequences += 1
    verdict.steps += len(received)
    count = min(len(received), len(expected))
    # Bits, not values: -0.0 is not 0.0, and NaN is NaN.
    differs = (received[:count].view(np.uint32) != expected[:count].view(np.uint32)).any(axis=1)
    if differs.any():
        step = int(differs.argmax())
        kind = _kind(received, expected, step)
        verdict.add(
            kind,
            f"{sequence_id}: output {step} is {kind}: {received[step].tolist()}, "
            f"not {expected[step].tolist()}",
        )
    elif len(received) > len(expected):
        verdict.add("doubled", f"{sequence_id}: {len(received)} outputs of {len(expected)} steps")
    elif is_whole and len(received) < len(expected):
        verdict.add("lost", f"{sequence_id}: {len(received)} outputs of {len(expected)} steps")


def _kind(received: NDArray[np.float32], expected: NDArray[np.float32], step: int) -> str:
    """What happened at the first output that differs, as far as one can tell from it."""
    value = received[step]
    if (value == expected[step + 1 : step + 1000]).all(axis=1).any():
        return "lost"
    if (value == expected[max(0, step - 1000) : step]).all(axis=1).any():
        return "doubled"
    return "wrong"


def judge(folder: Path, reference: Reference, *, must_be_whole: bool = True) -> Verdict:
    """Judge every journal in a folder."""
    verdict = Verdict()
    for sequence_id in sequence_ids(folder):
        assignment = read_id(sequence_id)
        journal = Journal(folder, sequence_id, OUTPUT_SIZES[assignment.model])
        ending = journal.ending
        if ending not in (None, DONE):
            verdict.add("error", f"{sequence_id}: {ending}")
        elif ending is None and must_be_whole:
            verdict.add(
                "unfinished",
                f"{sequence_id}: {journal.received} of {assignment.steps} steps, and no end",
            )
        expected = reference.outputs(assignment.model, assignment.inputs())
        compare(verdict, sequence_id, journal.outputs(), expected, is_whole=ending == DONE)
    return verdict


def judge_rivals(folders: list[Path]) -> Verdict:
    """Judge one sequence that several clients have had in turn: it must never have forked.

    Output `step` holds step + 1 addends, each client's own: so many of each as it has
    added by then, never fewer than an earlier output holds. Nobody gets what another got.
    """
    verdict = Verdict(sequences=1)
    received: dict[int, tuple[int, str]] = {}
    for folder in folders:
        if (folder / "error").exists():
            verdict.add("error", f"{folder.name}: {(folder / 'error').read_text()}")
        claims = folder / "claims"
        for line in claims.read_text().splitlines() if claims.exists() else ():
            step, value = map(int, line.split())
            verdict.steps += 1
            if step in received:
                verdict.add(
                    "doubled", f"output {step} came to {received[step][1]} and to {folder.name}"
                )
            received[step] = value, folder.name
    before = dict.fromkeys(RIVAL_ADDENDS, 0)
    for step, (value, name) in sorted(received.items()):
        second, first = divmod(value, RIVAL_ADDENDS[1])
        counts = dict(zip(RIVAL_ADDENDS, (first, second), strict=True))
        if first + second != step + 1:
            kind = "lost" if first + second < step + 1 else "doubled"
            verdict.add(kind, f"{name}: output {step} holds {first} and {second} steps")
        elif any(counts[addend] < before[addend] for addend in RIVAL_ADDENDS):
            verdict.add("wrong", f"{name}: output {step} is of another line: {before} → {counts}")
        before = counts
    return verdict
