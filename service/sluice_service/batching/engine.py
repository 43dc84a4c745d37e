"""Executes runs of one version of a model, and finds the rows at fault if a call fails."""

import time
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from sluice_model import Model, RunError, example_inputs
from sluice_protos.datatypes import DTYPES
from sluice_service.arrays import Array, is_finite
from sluice_service.batching.run import Run
from sluice_service.errors import LaneError, NonFiniteError, RunFailedError

log = structlog.get_logger()

_PROBES = ((1, 1), (32, 1), (32, 8))  # (sequences, steps) of the warm-up runs
_REPEATS = 5


@dataclass(slots=True)
class Outcome:
    """The outcome of a run."""

    outputs: list[Array]  # [batch, steps, …] each
    states: NDArray[np.float32]  # [batch, state_size]
    errors: dict[int, LaneError]  # by index, of rows that must not be applied
    seconds: float


class Engine:
    """Runs one model, and estimates from its warm-up how long a run takes."""

    def __init__(self, model: Model, *, refuses_non_finite: bool) -> None:
        """Does not run the model. Call `warm_up` before the first estimate."""
        self._model = model
        self._refuses_non_finite = refuses_non_finite

    def warm_up(self) -> None:
        """Run the model a few times, to measure it and to allocate its buffers."""
        self._call_seconds, self._cell_seconds = self._measure()

    def estimate(self, sequences: int, steps: int) -> float:
        """Seconds that a run of that size is expected to take."""
        return self._call_seconds + self._cell_seconds * sequences * steps

    def cells_within(self, seconds: float) -> int:
        """How many sequences × steps a run of that many seconds can hold."""
        return max(1, int((seconds - self._call_seconds) / self._cell_seconds))

    def execute(self, run: Run, states: NDArray[np.float32]) -> Outcome:
        """Run it from `states` [batch, state_size]; if it fails, find the rows at fault.

        This changes only `states`. The run loop applies the outcome.
        """
        started = time.monotonic()
        errors: dict[int, LaneError] = {}
        try:
            outputs, states = self._model.run(
                run.inputs, None if run.steps_each else run.lengths.astype(np.int32), states
            )
        except RunError:
            outputs = self._empty_outputs(run)
            lengths = run.lengths.astype(np.int32)
            self._narrow(run, lengths, states, outputs, range(len(lengths)), errors)
        self._judge(states, errors)
        return Outcome(outputs, states, errors, time.monotonic() - started)

    def failed(self, run: Run) -> Outcome:
        """The outcome of a run that failed through a defect of the server: a fault for each row."""
        count = len(run.slots)
        error = RunFailedError("an error inside the server; its log has the traceback")
        return Outcome(
            self._empty_outputs(run),
            np.zeros((count, len(self._model.initial_state)), np.float32),
            dict.fromkeys(range(count), error),
            0.0,
        )

    def _narrow(
        self,
        run: Run,
        lengths: NDArray[np.int32],
        states: NDArray[np.float32],
        outputs: list[Array],
        rows: range,
        errors: dict[int, LaneError],
    ) -> None:
        """Run `rows` in two halves, and a failing half in halves again; fill in the successes."""
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]) if half else (rows,):
            chosen = slice(part.start, part.stop)
            try:
                results, after = self._model.run(
                    [array[chosen] for array in run.inputs], lengths[chosen], states[chosen]
                )
            except RunError as error:
                if len(part) > 1:
                    self._narrow(run, lengths, states, outputs, part, errors)
                    continue
                log.warning("run_failed", model=self._model.contract.name, error=str(error))
                errors[part.start] = RunFailedError(
                    "ONNX Runtime failed on this chunk; it was not applied. Check its values "
                    "against what the model accepts; the server's log has the reason"
                )
            else:
                states[chosen] = after
                for output, result in zip(outputs, results, strict=True):
                    output[chosen] = result

    def _judge(self, states: NDArray[np.float32], errors: dict[int, LaneError]) -> None:
        """Add an error for each row of `states` [batch, state_size] that is not finite."""
        if self._refuses_non_finite and not is_finite(states):
            for row in np.flatnonzero(~np.isfinite(states).all(axis=1)).tolist():
                errors[row] = NonFiniteError(
                    "this chunk gives a state with NaN or infinity; it was not applied. Check the "
                    "input's scale against the training data, or serve with --non-finite allow"
                )

    def _empty_outputs(self, run: Run) -> list[Array]:
        batch, steps = run.inputs[0].shape[:2]
        return [
            np.zeros((batch, steps, *spec.shape), DTYPES[spec.datatype])
            for spec in self._model.contract.outputs
        ]

    def _measure(self) -> tuple[float, float]:
        """Seconds per call, and per sequence × step in it."""
        took = [self._time(sequences, steps) for sequences, steps in _PROBES]
        cells = np.array([sequences * steps for sequences, steps in _PROBES])
        cell, call = np.polyfit(cells, took, 1)
        return max(float(call), 1e-6), max(float(cell), 1e-8)

    def _time(self, sequences: int, steps: int) -> float:
        """Seconds of the fastest of a few runs of that size; slower ones shared the machine."""
        inputs = example_inputs(self._model.contract, sequences, steps)
        lengths = np.full(sequences, steps, np.int32)
        states = np.tile(self._model.initial_state, (sequences, 1))
        fastest = float("inf")
        for _ in range(_REPEATS):
            started = time.monotonic()
            self._model.run(inputs, lengths, states)
            fastest = min(fastest, time.monotonic() - started)
        return fastest
