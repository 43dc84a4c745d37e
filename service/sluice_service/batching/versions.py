"""Knows which version each sequence runs on: the one that was newest when it began."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sluice_model import ContractError, Model, ModelError, SelfTest, run_self_test
from sluice_protos.contract_pb2 import TensorSpec
from sluice_service.batching.engine import Engine, Outcome
from sluice_service.batching.inputs import STEPS_MAX
from sluice_service.batching.run import Run
from sluice_service.errors import InvalidInputError, LaneError, WrongModelError
from sluice_service.sequences.states import Slots, StateRows, States
from sluice_service.store.claims import State

# The version of a model without a repository.
ONLY = 1


@dataclass(eq=False)
class Version:
    """One loaded and tested file of a model. Warm it up before it serves."""

    number: int
    path: Path
    model: Model
    self_test: SelfTest
    engine: Engine
    seconds: float  # that loading took
    plane: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        # Every checkpoint needs these. Protobuf fields are slow, so read them once.
        self.contract = self.model.contract
        self.digest = self.contract.digest
        self.state_size = self.contract.state_size
        self.arithmetic = self.self_test.arithmetic

    def warm_up(self) -> None:
        """Measure how long runs take. The process should do nothing else meanwhile.

        Raises ModelError if the model cannot be run.
        """
        started = time.monotonic()
        with _refusing(self.path):
            self.engine.warm_up()
        self.seconds += time.monotonic() - started


def load_version(path: Path, number: int, *, threads: int, refuses_non_finite: bool) -> Version:
    """Load and test a file in any thread, which takes seconds.

    Raises ModelError if it cannot be served.
    """
    started = time.monotonic()
    with _refusing(path):
        model = Model.load(path, threads=threads)
        self_test = run_self_test(model)
    engine = Engine(model, refuses_non_finite=refuses_non_finite)
    return Version(number, path, model, self_test, engine, time.monotonic() - started)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn every error of a file into a ModelError, so that the server keeps running."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ContractError(
            f"{path}: cannot be loaded and tested ({type(error).__name__}: {error}); where that is "
            "not for want of memory, export it again"
        ) from error


class Versions:
    """The loaded versions of one model, oldest first, and which sequences run on each."""

    def __init__(self, first: Version, states: States, *, refuses_non_finite: bool) -> None:
        """The first plane of `states` belongs to the version `first`."""
        self._states = states
        self._refuses_non_finite = refuses_non_finite
        self._by_plane = {first.plane: first}
        self.newest = first

    def __iter__(self) -> Iterator[Version]:
        return iter(self._by_plane.values())

    def __len__(self) -> int:
        return len(self._by_plane)

    def of(self, slot: int) -> Version:
        """The version on which the sequence in a slot runs."""
        return self._by_plane[self._states.plane_of(slot)]

    def of_each(self, slots: Slots) -> list[Version]:
        """The version of each of `slots` [n]."""
        if len(self._by_plane) == 1:
            return [self.newest] * len(slots)
        return [self._by_plane[plane] for plane in self._states.planes(slots).tolist()]

    def find(self, digest: str) -> Version | None:
        """The version with that digest; the newest if several have it."""
        found = [version for version in self if version.digest == digest]
        return self.newest if self.newest in found else next(iter(found), None)

    def state_row(self, state: State) -> StateRows:
        """The row [state_size] of a state a client brings.

        Raises WrongModelError or InvalidInputError.
        """
        version = self.find(state.model_digest)
        if version is None:
            here = ", ".join(one.digest[:12] for one in self)
            raise WrongModelError(
                f"the state is of model {state.model_digest[:12]}, this is {here}; "
                "a state fits only the model that made it"
            )
        if state.step > STEPS_MAX:
            raise InvalidInputError(f"the state is of step {state.step}; steps end at {STEPS_MAX}")
        expected = 4 * version.state_size
        if len(state.row) != expected:
            raise InvalidInputError(f"the state has {len(state.row)} bytes, not {expected}")
        row: StateRows = np.frombuffer(state.row, "<f4")
        if self._refuses_non_finite and not np.isfinite(row).all():
            raise InvalidInputError("the state has NaN or infinity")
        return row

    def state_bytes(self, alive: Slots) -> int:
        """The bytes of the states of the slots `alive` [n]."""
        planes, counts = np.unique(self._states.planes(alive), return_counts=True)
        return sum(
            self._by_plane[plane].model.initial_state.nbytes * count
            for plane, count in zip(planes.tolist(), counts.tolist(), strict=True)
        )

    # Changes of versions, all of them between two runs.

    def adopt(self, version: Version) -> None:
        """Let sequences begin on `version` from now on. Raises ContractError if they cannot.

        A version that is already loaded, with the same number and digest, is used again.
        """
        self.check(version)
        for known in self:
            is_same = known.digest == version.digest
            if is_same and known.number == version.number:
                version = known
                self._states.turn_to(known.plane)
                break
        else:
            version.plane = self._states.begin_plane(version.model.initial_state)
            self._by_plane[version.plane] = version
        self.newest = version

    def check(self, version: Version) -> None:
        """Raise ContractError if clients of the newest version could not use this one."""
        for kind, before, after in (
            ("inputs", self.newest.contract.inputs, version.contract.inputs),
            ("outputs", self.newest.contract.outputs, version.contract.outputs),
        ):
            if list(map(_signature, before)) != list(map(_signature, after)):
                raise ContractError(
                    f"{version.path}: its {kind} are not those of version {self.newest.number}, "
                    "which clients hold streams to; serve it under another name, or unload the "
                    "model before"
                )

    def sweep(self, alive: Slots) -> list[Version]:
        """Unload versions on which no sequence runs or begins; `alive` [n] are all slots in use."""
        if len(self._by_plane) == 1:
            return []
        used = {*np.unique(self._states.planes(alive)).tolist(), self.newest.plane}
        gone = [version for version in self if version.plane not in used]
        for version in gone:
            del self._by_plane[version.plane]
            self._states.drop_plane(version.plane)
        return gone

    # Runs.

    def estimate(self, sequences: int, steps: int) -> float:
        """Seconds that a run of that size is expected to take."""
        return self.newest.engine.estimate(sequences, steps)

    def cells_within(self, seconds: float) -> int:
        """How many sequences × steps a run of that many seconds can hold."""
        return self.newest.engine.cells_within(seconds)

    def execute(self, run: Run) -> Outcome:
        """Execute a run, with one call for each version that its sequences run on.

        This reads the states and changes nothing. The run loop applies the outcome.
        """
        if len(self._by_plane) == 1:
            return self.newest.engine.execute(run, self._states.take(run.slots))
        planes = self._states.planes(run.slots)
        numbers = np.unique(planes).tolist()
        if len(numbers) == 1:
            return self._by_plane[numbers[0]].engine.execute(run, self._states.take(run.slots))
        parts = []
        for number in numbers:
            rows = np.flatnonzero(planes == number)
            part = run.only(rows)
            outcome = self._by_plane[number].engine.execute(part, self._states.take(part.slots))
            parts.append((rows, outcome))
        return _join(run, parts, self._states.row_size)

    def failed(self, run: Run) -> Outcome:
        """The outcome of a run that failed through no fault of its rows."""
        return self.newest.engine.failed(run)


def _join(run: Run, parts: list[tuple[Slots, Outcome]], state_size: int) -> Outcome:
    """Merge the outcomes of the parts of a run, each with its rows [n]."""
    batch = len(run.slots)
    states = np.zeros((batch, state_size), np.float32)
    outputs = [np.zeros((batch, *o.shape[1:]), o.dtype) for o in parts[0][1].outputs]
    errors: dict[int, LaneError] = {}
    for rows, outcome in parts:
        states[rows, : outcome.states.shape[1]] = outcome.states
        for output, result in zip(outputs, outcome.outputs, strict=True):
            output[rows] = result
        errors |= {int(rows[index]): error for index, error in outcome.errors.items()}
    return Outcome(outputs, states, errors, sum(o.seconds for _, o in parts))


def _signature(spec: TensorSpec) -> tuple[object, ...]:
    """The properties of an input or output that clients depend on."""
    valid = (spec.valid.min, spec.valid.max) if spec.HasField("valid") else None
    return spec.name, spec.datatype, tuple(spec.shape), valid
