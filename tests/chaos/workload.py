"""What the clients send: all that a sequence is follows from its id.

So a client that was killed can go on, and whoever judges it can work out what it must
have got.
"""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Sums stay exact in float32 for as long as they are below 2^24.
ADDEND_MAX = 2**9
STEPS_MAX = 2**14
FEATURES = {"accumulator": 1, "lstm": 8}
OUTPUT_SIZES = {"accumulator": 1, "lstm": 4}


@dataclass(frozen=True, slots=True)
class Assignment:
    """One sequence from its first step to its last."""

    model: str
    sequence_id: str
    steps: int
    # How the client hands its steps over: "step" by step, a "chunk" of several at
    # once, or a "stream" with many under way; `size` is of the chunk or of what is
    # under way.
    manner: str
    size: int

    def inputs(self) -> NDArray[np.float32]:
        """All of them: [steps, features].

        The accumulator's are whole numbers from 1 on, others in every sequence: what
        is lost, doubled or taken from another sequence shows in every sum after it.
        """
        draw = np.random.default_rng(list(self.sequence_id.encode()))
        if self.model == "accumulator":
            return draw.integers(1, ADDEND_MAX, (self.steps, 1)).astype(np.float32)
        return draw.standard_normal((self.steps, FEATURES[self.model])).astype(np.float32)


def make_id(seed: int, client: int, worker: int, number: int, steps_max: int) -> str:
    """The id of the sequence that comes as `number` on one worker of one client."""
    return f"{seed}-{client}-{worker}-{number}-{min(steps_max, STEPS_MAX)}"


def read_id(sequence_id: str) -> Assignment:
    """What is to be done in the sequence of that id."""
    _, _, worker, _, steps_max = map(int, sequence_id.split("-"))
    draw = random.Random(sequence_id)
    model = "lstm" if worker % 4 == 3 else "accumulator"
    manner = draw.choice(["step", "step", "chunk", "stream"])
    size = draw.choice([2, 7, 33]) if manner == "chunk" else draw.choice([4, 64])
    steps = draw.randint(max(1, steps_max // 4), steps_max)
    return Assignment(model, sequence_id, steps, manner, size)
