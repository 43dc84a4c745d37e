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
