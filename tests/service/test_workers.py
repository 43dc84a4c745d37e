"""Several server processes on one port: any of them takes any sequence, and one page shows all."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from sluice_protos.sequences_pb2 import RESUME, START_OR_RESUME
from tests.service.wire import SECONDS, Wire, floats

MODEL = "accumulator"
WORKERS = 2
# The parent of more workers than its pool has threads, as a machine of few processors has it:
# a pool has four more than those.
ONE_THREAD = "import os; os.cpu_count = lambda: -3; from sluice_cli.main import main; main()"


class Fleet:
    """`sluice serve --workers`, as an operator starts it."""

    def __init__(
        self, model: Path, folder: Path, *flags: str, program: Sequence[str] = ("-m", "sluice_cli")
    ) -> None:
        self.log = folder / "log.json"
        flags = flags or ("--store", f"sqlite:///{folder}/store.db", "--durability", "strict")
        address = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
        command = [sys.executable, *program, "serve", "--workers", str(WORKERS)]
        # Appended to, and read through another file: its writers share one position.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--model", f"{MODEL}={model}", *address, *flags], stderr=log
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of that event, so far."""
        # The last line may be half written.
        lines = self.log.read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line[0] == "{" and line[-1] == "\n"]
        return [line for line in found if line["event"] == name]

    def wait_for(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        deadline = time.monotonic() + SECONDS
        while len(found := self.events(name)) < count:
            assert time.monotonic() < deadline, f"no {name} in the log"
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.05)
        return found

    def ready(self) -> dict[str, Any]:
        """What the parent says once all workers serve."""
        deadline = time.monotonic() + SECONDS
        while not (found := [line for line in self.events("ready") if "workers" in line]):
            assert time.monotonic() < deadline, "not ready"
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.05)
        return found[0]

    def page(self, name: str) -> str:
        url = f"http://{self.ready()['http']}/{name}"
        with urllib.request.urlopen(url, timeout=SECONDS) as response:
            return str(response.read().decode())

    def metrics(self) -> str:
        """The page of every worker's metrics: one that was slow to tell them is asked again."""
        deadline = time.monotonic() + SECONDS
        while len(_workers_on(page := self.page("metrics"))) < WORKERS:
            assert time.monotonic() < deadline, "a worker's metrics are missing"
        return page

    def is_ready(self) -> bool:
        try:
            return self.page("readyz") == "ready\n"
        except urllib.error.HTTPError:
            return False

    def workers(self) -> list[int]:
        """The processes of the workers."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        children = map(int, path.read_text().split())
        return [
            child
            for child in children
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()
        ]

    def end(self) -> None:
        children = self.workers() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait(SECONDS)
        for child in children:
            _kill(child)


def _workers_on(page: str) -> set[str]:
    return set(re.findall(r'sluice_ready{worker="(\d)"}', page))


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def fleet(accumulator_file, tmp_path_factory) -> Iterator[Fleet]:
    """One that all tests share which leave it as it was."""
    fleet = Fleet(accumulator_file, tmp_path_factory.mktemp("fleet"))
    fleet.ready()
    yield fleet
    fleet.end()


@pytest.fixture
def own_fleet(accumulator_file, tmp_path) -> Iterator[Fleet]:
    fleet = Fleet(accumulator_file, tmp_path)
    fleet.ready()
    yield fleet
    fleet.end()


def connect(fleet: Fleet) -> grpc.aio.Channel:
    """A connection of its own: the kernel gives it to any of the workers."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(fleet.ready()["listen"], options=options)


def opened_by_worker(fleet: Fleet) -> dict[str, float]:
    """How many sequences each worker has opened."""
    pattern = r'sluice_sequences_opened_total{[^}]*worker="(\d+)"} (\S+)'
    found: dict[str, float] = {}
    for worker, value in re.findall(pattern, fleet.page("metrics")):
        found[worker] = found.get(worker, 0) + float(value)
    return found


async def test_a_sequence_goes_on_at_whichever_worker_takes_the_next_connection(fleet) -> None:
    total, step = 0.0, 0
    while len(opened_by_worker(fleet)) < WORKERS or step < 10:
        assert step < 200, "every connection went to the same worker"
        channel = connect(fleet)
        wire = Wire(channel, model=MODEL)
        opened = await wire.open(
            0, "moving", mode=START_OR_RESUME, writer=b"me", attempt=step, received=step
        )
        assert opened.applied == step
        await wire.push(0, floats([step]), first=step)
        total += step
        assert (await wire.rows(0, 1)).item() == total
        step += 1
        await channel.close()


async def test_the_metrics_of_every_worker_are_on_one_page(fleet) -> None:
    page = fleet.metrics()
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "sluice_ready"):
        assert set(re.findall(rf'{name}{{worker="(\d)"}}', page)) == {"0", "1"}
    assert page.count("# TYPE sluice_ready gauge") == 1
    assert fleet.page("readyz") == "ready\n"


async def test_a_worker_that_dies_is_started_again_and_its_sequences_go_on(fleet) -> None:
    channel = connect(fleet)
    wire = Wire(channel, model=MODEL)
    await wire.open(0, "s", writer=b"me", attempt=1)
    await wire.push(0, floats([1, 2]), first=0)
    await wire.rows(0, 2)
    for worker in fleet.workers():
        os.kill(worker, signal.SIGKILL)
    # A ready line of each worker before, one of the parent, and one of each worker again.
    fleet.wait_for("ready", 2 * WORKERS + 1)
    assert len(fleet.events("worker_died")) == WORKERS
    await channel.close()
    channel = connect(fleet)
    wire = Wire(channel, model=MODEL)
    opened = await wire.open(0, "s", mode=RESUME, writer=b"me", attempt=2, received=2)
    assert opened.applied == 2
    await channel.close()


def test_a_stop_ends_all_in_good_order(own_fleet) -> None:
    fleet = own_fleet
    fleet.process.terminate()
    assert fleet.process.wait(SECONDS) == 0
    assert len(fleet.events("stopped")) == WORKERS + 1
    assert not fleet.events("worker_died")


def test_workers_end_when_the_one_who_watches_them_is_killed(own_fleet) -> None:
    fleet = own_fleet
    workers = fleet.workers()
    assert len(workers) == WORKERS
    fleet.process.kill()
    deadline = time.monotonic() + SECONDS
    while any(Path(f"/proc/{worker}/exe").exists() and _lives(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


def _lives(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status


def test_a_worker_is_watched_however_few_threads_there_are(accumulator_file, tmp_path) -> None:
    fleet = Fleet(accumulator_file, tmp_path, program=("-c", ONE_THREAD))
    try:
        fleet.ready()
        for count, worker in enumerate(fleet.workers(), start=1):
            os.kill(worker, signal.SIGKILL)
            fleet.wait_for("worker_died", count)
            # A ready line of each worker before, one of the parent, and one of this worker again.
            fleet.wait_for("ready", WORKERS + 1 + count)
        deadline = time.monotonic() + SECONDS
        while not fleet.is_ready():
            assert time.monotonic() < deadline, "nobody has heard of a worker that serves again"
            time.sleep(0.05)
    finally:
        fleet.end()


def test_a_worker_that_cannot_be_started_again_is_tried_again_later(own_fleet) -> None:
    fleet = own_fleet
    first, second = fleet.workers()
    limits = resource.prlimit(fleet.process.pid, resource.RLIMIT_NOFILE)
    # No pipe can be made for the next process.
    resource.prlimit(fleet.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(first, signal.SIGKILL)
    reason = fleet.wait_for("worker_not_started", 2)[0]["reason"]
    assert "Too many open files" in reason
    assert fleet.workers() == [second]
    resource.prlimit(fleet.process.pid, resource.RLIMIT_NOFILE, limits)
    # A ready line of each worker before, one of the parent, and one of the worker again.
    fleet.wait_for("ready", WORKERS + 2)
    assert second in fleet.workers()


def test_a_model_that_cannot_be_served_ends_the_start(tmp_path) -> None:
    fleet = Fleet(tmp_path / "none.onnx", tmp_path)
    assert fleet.process.wait(SECONDS) == 2
    assert "cannot be read" in fleet.events("cannot_start")[0]["reason"]
    fleet.end()


def test_workers_without_a_store_that_they_share_are_refused(accumulator_file, tmp_path) -> None:
    fleet = Fleet(accumulator_file, tmp_path, "--durability", "strict")
    assert fleet.process.wait(SECONDS) == 2
    assert "--store" in fleet.log.read_text()
    fleet.end()
