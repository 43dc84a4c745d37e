"""What the clients send: every sequence's length and inputs follow from its id alone.

So a client that was killed can go on, and whoever judges it can work out what it must have got.
"""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Sums stay exact in float32 for as long as they are below 2^24.
ADDEND_MAX = 2**9
STEPS_MAX = 2**14
LSTM_FEATURES = 8


@dataclass(frozen=True, slots=True)
class Manner:
    """How a client hands the steps of one sequence to the library."""

    # "step" one by one, "chunk" several at once, "stream" many under way.
    kind: str
    size: int  # of a chunk, or of what is under way


@dataclass(frozen=True, slots=True)
class Assignment:
    """One sequence from its first step to its last."""

    model: str
    sequence_id: str
    steps: int
    manner: Manner

    def inputs(self) -> NDArray[np.float32]:
        """All of them: [steps, features]."""
        return inputs(self.model, self.sequence_id, self.steps)


def assignment(seed: int, client: int, worker: int, number: int, *, steps_max: int) -> Assignment:
    """The sequence that comes as `number` on one worker of one client."""
    sequence_id = f"{seed}-{client}-{worker}-{number}"
    draw = random.Random(sequence_id)
    model = "lstm" if worker % 4 == 3 else "accumulator"
    kind = draw.choice(["step", "step", "chunk", "stream"])
    size = draw.choice([2, 7, 33]) if kind == "chunk" else draw.choice([4, 64])
    steps = draw.randint(steps_max // 8, steps_max)
    return Assignment(model, sequence_id, steps, Manner(kind, size))


def inputs(model: str, sequence_id: str, steps: int) -> NDArray[np.float32]:
    """The inputs of a sequence, [steps, features].

    The accumulator's are whole numbers from 1 on, different in every sequence: what is
    lost, doubled or taken from another sequence changes every sum after it.
    """
    assert steps <= STEPS_MAX
    draw = np.random.default_rng(list(sequence_id.encode()))
    if model == "accumulator":
        return draw.integers(1, ADDEND_MAX, (steps, 1)).astype(np.float32)
    return draw.standard_normal((steps, LSTM_FEATURES)).astype(np.float32)
