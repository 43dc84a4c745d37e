"""Holds the evidence of proofs: a model, its reference, and runs of both on the same sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from sluice_export.proof.comparison import Array, Result, measure_scale
from sluice_model.contract import part_size
from sluice_model.model import Model, example_inputs

# The default tolerance, relative to the largest values of each output: float32 keeps about seven
# digits, a wrong gate or a lost bias leaves none.
TOLERANCE: Final = 1e-4
STEPS: Final = 11
# Rows that end at the full length, within it, and after one step.
LENGTHS: Final = np.array([STEPS, 6, 1, 8], np.int32)
# Where a run in two chunks is cut.
CUT: Final = 6


@dataclass(frozen=True)
class Expected:
    """The results of a reference: outputs [batch, steps, …] each, and its last state."""

    outputs: list[Array]
    # [batch, size] each, by the name of the part; without parts that the reference hides.
    states: Mapping[str, Array] = field(default_factory=dict)
    # The steps that the outputs are of; None: all.
    steps: Sequence[int] | None = None


class Reference(Protocol):
    """What a graph was made from, as it was before: what every proof compares with."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def run(self, inputs: Sequence[Array]) -> Expected:
        """Whole sequences of one length from the initial state; `inputs` [batch, steps, …] each."""


class Evidence:
    """A model, its reference, and runs of both on the same sequences."""

    def __init__(self, model: Model, reference: Reference, *, tolerance: float) -> None:
        """Run the reference; `tolerance` is relative to the largest values of each feature."""
        self.model = model
        self.reference = reference
        self.tolerance = tolerance
        self.batch = len(LENGTHS)
        self.inputs = example_inputs(model.contract, self.batch, STEPS, seed=4)
        self.initial = np.tile(model.initial_state, (self.batch, 1))
        self.expected = reference.run(self.inputs)
        names = [spec.name for spec in model.contract.outputs]
        self._scales = dict(zip(names, map(measure_scale, self.expected.outputs), strict=True))

    def pair(self, actual: Result, expected: Expected) -> list[tuple[str, Array, Array]]:
        """Two results side by side: (name, actual, expected) of each state part and output."""
        contract = self.model.contract
        pairs = []
        for part in contract.state:
            if part.name in expected.states:
                place = slice(part.offset, part.offset + part_size(part))
                pairs.append((part.name, actual.state[:, place], expected.states[part.name]))
        for spec, one, two in zip(contract.outputs, actual.outputs, expected.outputs, strict=True):
            pairs.append(
                (spec.name, one if expected.steps is None else one[:, expected.steps], two)
            )
        return pairs

    def scale(self, name: str, expected: Array) -> Array | None:
        """What differences of an output are relative to; None for a part of the state."""
        if name not in self._scales:
            return None
        return np.maximum(self._scales[name], measure_scale(expected))

    def run_chunks(self, chunk: int) -> Result:
        """The whole sequences in chunks of at most `chunk` steps, the state carried between."""
        pieces: list[list[Array]] = []
        state = self.initial
        for start in range(0, STEPS, chunk):
            rows = [array[:, start : start + chunk] for array in self.inputs]
            lengths = np.full(self.batch, rows[0].shape[1], np.int32)
            outputs, state = self.model.run(rows, lengths, state)
            pieces.append(outputs)
        return Result([np.concatenate(p, axis=1) for p in zip(*pieces, strict=True)], state)

    def run_ragged(self, inputs: Sequence[Array], initial: Array | None = None) -> Result:
        """All rows in one run, each of its own length, from `initial` or the initial state."""
        state = self.initial if initial is None else initial
        return Result(*self.model.run(inputs, LENGTHS, state))
