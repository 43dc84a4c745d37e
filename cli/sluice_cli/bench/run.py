"""Runs a load: starts and times its processes, measures the server, and merges the figures."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from sluice_cli.bench.plan import Plan
from sluice_cli.bench.tally import Tally
from sluice_cli.bench.watched import Usage, Watch
from sluice_cli.bench.worker import Failed, Finished, Message, Opened, Progress, Recording, work
from sluice_protos.contract_pb2 import ModelContract

# From the start signal to all processes until the first chunk.
_START_SECONDS = 0.1

# Called with the current phase, the share of the load done (0 to 1), and the answered steps.
Tell = Callable[[str, float, int], None]


class LoadError(Exception):
    """The load could not be run; the message says why."""


@dataclass
class Result:
    """What a load measured."""

    plan: Plan
    tally: Tally
    open_seconds: float
    # At the begin and the end of the measured time; None if the usage is not read.
    usage: tuple[Usage, Usage] | None
    recordings: list[Recording]
    contract: ModelContract

    @property
    def steps_per_second(self) -> float:
        """Outputs received per second of the measured time."""
        return self.tally.steps_done / self.plan.duration

    @property
    def server_cpu_per_step(self) -> float | None:
        """Microseconds of the server's CPU, all threads."""
        if self.usage is None or not self.tally.steps_done:
            return None
        before, after = self.usage
        return 1e6 * (after.cpu_seconds - before.cpu_seconds) / self.tally.steps_done


def run_load(plan: Plan, watch: Watch | None = None, tell: Tell | None = None) -> Result:
    """Send the load and return what was measured. Raises LoadError."""
    tell = tell or (lambda what, share, steps: None)
    started = time.monotonic()
    with _processes(plan) as parents:
        tell(f"opening {plan.sequences:,} sequences", 0.0, 0)
        contract = _gather_opened(parents)
        open_seconds = time.monotonic() - started
        start = time.monotonic() + _START_SECONDS
        begin = start + plan.warmup
        end = begin + plan.duration
        for parent in parents:
            parent.send((start, begin, end))
        usages: list[Usage] = []
        steps = [0] * len(parents)
        finished: list[Finished] = []
        waiting = list(parents)
        while waiting:
            now = time.monotonic()
            if watch is not None and len(usages) < 2 and now >= (begin, end)[len(usages)]:
                usages.append(watch())
            phase = "warming up" if now < begin else "sending" if now < end else "waiting"
            tell(phase, min(1.0, max(0.0, (now - start) / (end - start))), sum(steps))
            upcoming = [instant - now for instant in (begin, end) if instant > now]
            ready = wait(waiting, min(0.1, *upcoming, 1.0))
            for number, parent in enumerate(parents):
                if parent not in ready:
                    continue
                message = _receive(parent)
                if isinstance(message, Progress):
                    steps[number] = message.steps
                elif isinstance(message, Finished):
                    finished.append(message)
                    waiting.remove(parent)
        if watch is not None and len(usages) < 2:
            usages.append(watch())
    return Result(
        plan,
        Tally.merge(one.tally for one in finished),
        open_seconds,
        (usages[0], usages[1]) if usages else None,
        [recording for one in finished for recording in one.recordings],
        contract,
    )


@contextmanager
def _processes(plan: Plan) -> Iterator[list[Connection]]:
    """The processes of a load, each with a connection to it; ended with the block."""
    # A fork would inherit threads and locks if this process has used gRPC before.
    context = multiprocessing.get_context("spawn")
    parents, processes = [], []
    try:
        for number in range(plan.processes):
            parent, child = context.Pipe()
            process = context.Process(target=work, args=(plan, number, child), daemon=True)
            process.start()
            child.close()
            parents.append(parent)
            processes.append(process)
        yield parents
    finally:
        for parent in parents:
            parent.close()
        for process in processes:
            process.join(5)
            process.kill()


def _gather_opened(parents: list[Connection]) -> ModelContract:
    """Wait until all processes have opened their sequences. Returns the contract."""
    contract = ModelContract()
    for parent in parents:
        message = _receive(parent)
        assert isinstance(message, Opened)
        contract = ModelContract.FromString(message.contract)
    return contract


def _receive(parent: Connection) -> Message:
    try:
        message: Message = parent.recv()
    except EOFError:
        raise LoadError("a process of the load has died; its error is above") from None
    if isinstance(message, Failed):
        raise LoadError(message.message)
    return message
