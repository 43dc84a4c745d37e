"""Describes one call of the model: which sequences it runs, and how many steps of each."""

import itertools
from dataclasses import dataclass

from sluice_service.arrays import Array, Integers, is_whole
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import NONE


@dataclass(slots=True)
class RunSizes:
    """How large a run may be."""

    sequences_max: int
    steps_max: int  # of one sequence
    cells_max: int  # sequences × steps; depends on the version of the model


@dataclass(slots=True)
class Run:
    """One call of the model: `batch` sequences, each `lengths[b]` steps on."""

    slots: Slots  # [batch], all different
    nodes: Integers | None  # [batch] the chunks in the queues; None: they were in no queue
    first: Integers  # [batch] steps applied before
    lengths: Integers  # [batch]
    steps_each: int  # of every row; 0 if they differ
    inputs: list[Array]  # [batch, steps, …] each
    lanes: Integers  # [batch]
    # The numbers of the streams of the rows, and where the rows of each end.
    streams: list[tuple[int, int]]
    arrived: list[float]  # when messages arrived, and how many chunks of each are in the run
    weights: list[int]
    is_apart: bool = False  # a thread executes it

    def split(self, count: int) -> list["Run"]:
        """Split it into that many runs of about equal size."""
        batch = len(self.slots)
        ends = [batch * (part + 1) // count for part in range(count)]
        return [self._part(start, end) for start, end in itertools.pairwise([0, *ends])]

    def _part(self, start: int, end: int) -> "Run":
        """Rows `start` to `end`; all messages count as those of the first rows."""
        streams = [
            (number, min(last, end) - start)
            for (_, first), (number, last) in itertools.pairwise([(NONE, 0), *self.streams])
            if first < end and last > start
        ]
        lengths = self.lengths[start:end]
        return Run(
            self.slots[start:end],
            None if self.nodes is None else self.nodes[start:end],
            self.first[start:end],
            lengths,
            self.steps_each or steps_each(lengths, self.inputs),
            [array[start:end] for array in self.inputs],
            self.lanes[start:end],
            streams,
            self.arrived if not start else [],
            self.weights if not start else [],
        )

    def only(self, rows: Integers) -> "Run":
        """Some of its rows [n], for execution."""
        lengths = self.lengths[rows]
        return Run(
            self.slots[rows],
            None,
            self.first[rows],
            lengths,
            self.steps_each or steps_each(lengths, self.inputs),
            [array[rows] for array in self.inputs],
            self.lanes[rows],
            [],
            [],
            [],
        )


def steps_each(lengths: Integers, inputs: list[Array]) -> int:
    """The steps of `inputs` [batch, steps, …] if all `lengths` [batch] equal it, else 0."""
    steps: int = inputs[0].shape[1]
    return steps if is_whole(lengths, steps) else 0
