"""Executes runs of one model: states from the arena, one call, failures narrowed to their rows."""

import time
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from sluice_model import Model, RunError, example_inputs
from sluice_service.arena import Arena
from sluice_service.errors import LaneError, NonFiniteError, RunFailedError
from sluice_service.ragged import Array
from sluice_service.scheduler import Run

log = structlog.get_logger()

_PROBES = ((1, 1), (32, 1), (32, 8))  # (sequences, steps) of the warm-up runs
_REPEATS = 5


@dataclass(slots=True)
class Outcome:
    """What became of a run, or of the part of it that shares one fate."""

    run: Run
    outputs: list[Array]  # [batch, steps, …] each; empty where the run failed
    states: NDArray[np.float32]  # [batch, state_size]
    is_applied: NDArray[np.bool_]  # [batch]
    error: LaneError | None  # of the rows that were not applied
    seconds: float


class Engine:
    """Runs one model, and knows from its warm-up how long a run takes."""

    def __init__(self, model: Model, arena: Arena, *, refuses_non_finite: bool) -> None:
        """Warm the model up; every later call finds its buffers and code paths ready."""
        self._model = model
        self._arena = arena
        self._refuses_non_finite = refuses_non_finite
        self._call_seconds, self._cell_seconds = self._measure()

    def estimate(self, sequences: int, steps: int) -> float:
        """Seconds that a run of that size is expected to take."""
        return self._call_seconds + self._cell_seconds * sequences * steps

    def cells_within(self, seconds: float) -> int:
        """How many sequences × steps a run of that many seconds can hold."""
        return max(1, int((seconds - self._call_seconds) / self._cell_seconds))

    def execute(self, run: Run) -> list[Outcome]:
        """Run it; where it fails, halve it until the rows at fault stand alone.

        Reads the arena and changes nothing: to apply an outcome is the host's.
        """
        started = time.monotonic()
        try:
            outputs, states = self._model.run(
                run.inputs, run.lengths.astype(np.int32), self._arena.take(run.slots)
            )
        except RunError as error:
            if len(run.slots) > 1:
                half = len(run.slots) // 2
                return self.execute(run.part(slice(half))) + self.execute(
                    run.part(slice(half, None))
                )
            log.warning("run_failed", model=self._model.contract.name, error=str(error))
            return [self.failed(run, time.monotonic() - started)]
        is_applied, fault = self._judge(states)
        return [Outcome(run, outputs, states, is_applied, fault, time.monotonic() - started)]

    def _judge(self, states: NDArray[np.float32]) -> tuple[NDArray[np.bool_], LaneError | None]:
        """Which rows [batch] have a state to go on from, and the fault of the others."""
        if not self._refuses_non_finite or np.isfinite(states.sum()):
            return np.ones(len(states), np.bool_), None
        return np.asarray(np.isfinite(states).all(axis=1)), NonFiniteError(
            "this chunk gives a state with NaN or infinity; it was not applied. Check the "
            "input's scale against the training data, or serve with --non-finite allow"
        )

    def failed(self, run: Run, seconds: float) -> Outcome:
        """The outcome of a run that gave nothing."""
        return Outcome(
            run,
            [],
            np.empty((len(run.slots), 0), np.float32),
            np.zeros(len(run.slots), np.bool_),
            RunFailedError(
                "ONNX Runtime failed on this chunk; it was not applied. Check its values against "
                "what the model accepts; the server's log has the reason"
            ),
            seconds,
        )

    def _measure(self) -> tuple[float, float]:
        """Seconds of a call, and of each sequence × step in it."""
        took = [self._time(sequences, steps) for sequences, steps in _PROBES]
        cells = np.array([sequences * steps for sequences, steps in _PROBES])
        cell, call = np.polyfit(cells, took, 1)
        return max(float(call), 1e-6), max(float(cell), 1e-8)

    def _time(self, sequences: int, steps: int) -> float:
        """The fastest of a few runs of that size: the others shared the machine."""
        inputs = example_inputs(self._model.contract, sequences, steps)
        lengths = np.full(sequences, steps, np.int32)
        states = np.tile(self._model.initial_state, (sequences, 1))
        fastest = float("inf")
        for _ in range(_REPEATS):
            started = time.monotonic()
            self._model.run(inputs, lengths, states)
            fastest = min(fastest, time.monotonic() - started)
        return fastest
