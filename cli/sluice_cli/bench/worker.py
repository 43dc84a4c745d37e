"""Runs one client process of a load: connects, opens, sends, and reports to the parent."""

import asyncio
import selectors
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice_cli.bench.inputs import Inputs, Integers
from sluice_cli.bench.plan import Plan
from sluice_cli.bench.tally import Tally
from sluice_cli.bench.traffic import Traffic
from sluice_client.errors import SluiceError
from sluice_client.load import LoadStream

_RECONNECT_SECONDS_MAX = 5.0
_PROGRESS_SECONDS = 0.2


@dataclass
class Recording:
    """The first outputs of some sequences, with the offsets of their inputs and their counts."""

    offsets: Integers
    counts: Integers
    outputs: dict[str, NDArray[Any]]


@dataclass
class Opened:
    """All sequences of a process are open. Carries the model's contract, serialized."""

    contract: bytes


@dataclass
class Progress:
    """Steps answered so far."""

    steps: int


@dataclass
class Finished:
    """The results of a process."""

    tally: Tally
    recordings: list[Recording]


@dataclass
class Failed:
    """A process has failed; the message says why."""

    message: str


Message = Opened | Progress | Finished | Failed


def work(plan: Plan, process: int, parent: Connection) -> None:
    """Do one process's share of `plan`. Sends Messages and receives (start, begin, end)."""
    try:
        # epoll rounds every wait up to a millisecond.
        with asyncio.Runner(
            loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
        ) as runner:
            runner.run(_work(plan, process, parent))
    except SluiceError as error:
        parent.send(Failed(str(error)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has ended or was interrupted


async def _work(plan: Plan, process: int, parent: Connection) -> None:
    address = plan.addresses[process % len(plan.addresses)]
    numbers = plan.streams_of(process)
    streams = [LoadStream(address, plan.model, _RECONNECT_SECONDS_MAX) for _ in numbers]
    try:
        await _flow(plan, numbers, streams, parent)
    finally:
        await asyncio.gather(*(stream.close() for stream in streams))


async def _flow(
    plan: Plan, numbers: list[int], streams: list[LoadStream], parent: Connection
) -> None:
    contract = await streams[0].contract()
    inputs = Inputs(contract, plan.seed)
    await asyncio.gather(*(stream.start() for stream in streams))
    traffics = [
        Traffic(plan, number, stream, inputs)
        for number, stream in zip(numbers, streams, strict=True)
    ]
    await asyncio.gather(*(traffic.open() for traffic in traffics))
    parent.send(Opened(contract.SerializeToString()))
    start, begin, end = await asyncio.to_thread(parent.recv)
    telling = asyncio.create_task(_tell(traffics, parent))
    try:
        await asyncio.gather(*(traffic.flow(start, begin, end) for traffic in traffics))
    finally:
        telling.cancel()
    tally = Tally.merge(traffic.tally() for traffic in traffics)
    for traffic in traffics:
        if traffic.error is not None:
            raise traffic.error
    await asyncio.gather(*(traffic.close() for traffic in traffics))
    kept = [traffic.kept for traffic in traffics if np.any(traffic.kept.counts)]
    parent.send(Finished(tally, [Recording(one.offsets, one.counts, one.outputs) for one in kept]))


async def _tell(traffics: list[Traffic], parent: Connection) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        parent.send(Progress(sum(traffic.steps_done for traffic in traffics)))
