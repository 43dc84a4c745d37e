"""A folder of models: new versions under live sequences, bad files, loading by clients."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from sluice_model import ModelError
from sluice_protos import open_inference_pb2 as pb
from sluice_protos.sequences_pb2 import (
    Closed,
    Fault,
    ForkRequest,
    GetModelRequest,
    OpenSequence,
)
from sluice_service.batching.versions import Version
from sluice_service.settings import Settings
from tests.compat.caller import SECONDS, Caller, request, values
from tests.compat.models import write_breaking_accumulator, write_gained_accumulator
from tests.service.wire import Served, eventually, floats

Code = grpc.StatusCode


class Folder:
    """A repository of accumulators; those of version n multiply by n."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self._source = source

    def put(self, version: int, gain: int | None = None, name: str = "sum") -> None:
        path = self.path / name / str(version) / "model.onnx"
        write_gained_accumulator(self._source, path, gain or version)

    def put_bytes(self, version: int, data: bytes, name: str = "sum") -> None:
        path = self.path / name / str(version) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def remove(self, version: int | None = None, name: str = "sum") -> None:
        path = self.path / name
        shutil.rmtree(path if version is None else path / str(version))


@pytest.fixture
def folder(tmp_path, accumulator_file) -> Folder:
    """A repository with version 1 of one model."""
    folder = Folder(tmp_path / "repository", accumulator_file)
    folder.put(1)
    return folder


@pytest.fixture
async def followed(serve, folder) -> Callable[..., Awaitable[Served]]:
    """`await followed(control)`: a server of the repository that looks when it is told to."""

    async def start(control: str = "poll", **settings: Any) -> Served:
        fields = {"repository_poll_seconds": 1e6, "model_control": control, **settings}
        return await serve({}, model_repository=folder.path, **fields)

    return start


async def index(caller: Caller, *, ready: bool = False) -> dict[tuple[str, str], str]:
    """The states of the versions there are, with the reasons of those that are not ready."""
    answer = await caller.stub.RepositoryIndex(
        pb.RepositoryIndexRequest(ready=ready), timeout=SECONDS
    )
    return {(m.name, m.version): f"{m.state} {m.reason}".strip() for m in answer.models}


def ask(number: float, sequence: Any = None, **fields: Any) -> pb.ModelInferRequest:
    if sequence is not None:
        fields["sequence_id"] = sequence
    return request(number, model="sum", **fields)


async def test_the_newest_version_is_served(folder, followed) -> None:
    folder.put(2)
    folder.put(10)
    (folder.path / "sum" / "notes").mkdir()
    (folder.path / "sum" / "011").mkdir()
    caller = Caller((await followed("none")).channel)
    answer = await caller.send(ask(1))
    assert (values(answer), answer.model_version) == ([10], "10")
    assert (await index(caller))["sum", "2"] == "UNAVAILABLE version 10 is served"
    assert await index(caller, ready=True) == {("sum", "10"): "READY"}
    metadata = await caller.stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=SECONDS)
    assert "model_repository" in metadata.extensions


async def test_live_sequences_finish_on_their_version_and_new_ones_take_the_next(
    folder, followed
) -> None:
    served = await followed()
    caller, wire = Caller(served.channel), served.wire("sum")
    await caller.send(ask(1, 7, sequence_start=True))
    await wire.open(0, "native")
    await wire.push(0, floats([1]))
    assert (await wire.rows(0, 1)) == 1
    folder.put(3)
    await served.server._repository.look()
    # What lives goes on, whichever way it is asked for, beside what begins now, in one run.
    old, new = await caller.send(ask(2, 7)), await caller.send(ask(2, 8, sequence_start=True))
    assert (values(old), old.model_version) == ([3], "1")
    assert (values(new), new.model_version) == ([6], "3")
    await wire.open(1, "later")
    await wire.send(lane=[0, 1], steps=[2, 2], inputs=[{"data": floats([1, 2, 3, 4]).tobytes()}])
    assert (await wire.rows(0, 2)).ravel().tolist() == [2, 4]
    assert (await wire.rows(1, 2)).ravel().tolist() == [9, 21]
    assert values(await caller.send(ask(5))) == [15]
    assert (await index(caller)) == {
        ("sum", "1"): "UNLOADING its live sequences finish on it",
        ("sum", "3"): "READY",
    }
    assert served.metric("sluice_model_versions_loaded", model="sum") == 2
    assert served.metric("sluice_state_bytes", model="sum") > 0
    digests = {(await served.state("sum", name)).model_digest for name in ("native", "later")}
    assert len(digests) == 2
    # With the last of its sequences the old version goes.
    await caller.send(ask(1, 7, sequence_end=True))
    await wire.send(close=[0])
    assert await wire.next_closed(0) == Closed.CLIENT
    await served.server.hosts["sum"].sweep()
    assert await index(caller) == {
        ("sum", "1"): "UNAVAILABLE version 3 is served",
        ("sum", "3"): "READY",
    }
    assert served.metric("sluice_model_version", model="sum") == 3
    assert served.metric("sluice_model_versions_loaded", model="sum") == 1
    await wire.push(1, floats([5]))
    assert (await wire.rows(1, 1)) == 36
    assert values(await caller.send(ask(1, 8, sequence_end=True))) == [9]


async def test_a_checkpoint_is_of_the_version_that_made_it(folder, followed, tmp_path) -> None:
    settings = {"store": f"sqlite:///{tmp_path}/sequences.db", "durability": "strict"}
    served = await followed(**settings)
    wire = served.wire("sum")
    await wire.open(0, "old", writer=b"me")
    folder.put(2)
    await served.server._repository.look()
    await wire.open(1, "new", writer=b"me")
    await wire.send(lane=[0, 1], inputs=[{"data": floats([1, 1]).tobytes()}])
    assert (await wire.rows(0, 1), await wire.rows(1, 1)) == (1, 2)
    copy = await served.sequences.Fork(
        ForkRequest(model="sum", sequence_id="old", fork_id="copy", writer=b"me"), timeout=SECONDS
    )
    await wire.open(2, "copy", mode="RESUME", writer=b"me", attempt=1)
    assert copy.step == 1
    await wire.push(2, floats([5]))
    assert (await wire.rows(2, 1)) == 6
    await served.server.stop()
    served.is_stopped = True

    async def resume(*versions: int) -> list[float | str]:
        """What a server of these versions makes of both."""
        folder.remove()
        for version in versions:
            folder.put(version)
        wire = (await followed(**settings)).wire("sum")
        found: list[float | str] = []
        for lane, name in enumerate(("old", "new")):
            await wire.send(
                open=[
                    OpenSequence(
                        lane=lane, sequence_id=name, mode="RESUME", writer=b"me", attempt=1
                    )
                ]
            )
            await wire.until(lambda lane=lane: wire.opened[lane] or wire.faults[lane])
            if wire.faults[lane]:
                found.append(Fault.Reason.Name(wire.faults[lane][0].reason))
            else:
                await wire.rows(lane, 1)  # what was held
                await wire.push(lane, floats([1]))
                found.append((await wire.rows(lane, 1)).item())
        return found

    assert await resume(2) == ["WRONG_MODEL", 4]


async def test_a_version_that_comes_during_a_run_waits_for_it(gate, folder, followed) -> None:
    served = await followed()
    wire = served.wire("sum")
    await wire.open(0)
    await wire.push(0, floats([1]))
    await gate.reached()
    (host,) = served.server.hosts.values()
    folder.put(2)
    version = served.server.hosts.load(folder.path / "sum" / "2" / "model.onnx", 2)
    adopting = asyncio.ensure_future(host.adopt(version))
    await eventually(lambda: host._runs._waiting)
    assert host.version.number == 1
    await gate.let_through()
    await adopting
    assert host.version.number == 2
    assert (await wire.rows(0, 1)) == 1
    await wire.push(0, floats([1]))
    await gate.let_through()
    assert (await wire.rows(0, 1)) == 2


async def test_a_second_start_begins_on_the_newest_version(folder, followed) -> None:
    served = await followed()
    caller = Caller(served.channel)
    assert values(await caller.send(ask(1, 7, sequence_start=True))) == [1]
    folder.put(2)
    await served.server._repository.look()
    answer = await caller.send(ask(1, 7, sequence_start=True))
    assert (values(answer), answer.model_version) == ([2], "2")
    await served.server.hosts["sum"].sweep()
    assert len(served.server.hosts["sum"].versions) == 1


async def test_a_version_may_be_named(folder, followed) -> None:
    served = await followed()
    caller = Caller(served.channel)
    await caller.send(ask(1, 7, sequence_start=True))
    folder.put(2)
    await served.server._repository.look()

    async def fails(message: pb.ModelInferRequest, version: str) -> str:
        message.model_version = version
        code, text = await caller.fails(message)
        assert code is Code.NOT_FOUND
        return text

    for version in ("1", "2"):
        message = ask(1, 7 if version == "1" else None)
        message.model_version = version
        assert (await caller.send(message)).model_version == version
    assert "takes no new sequences" in await fails(ask(1, 9, sequence_start=True), "1")
    assert "takes no new sequences" in await fails(ask(1), "1")
    assert "version 1 until it ends" in await fails(ask(1, 7), "2")
    assert "no version '3'" in await fails(ask(1), "3")
    ready = [
        (await caller.stub.ModelReady(pb.ModelReadyRequest(name="sum", version=version))).ready
        for version in ("", "1", "2", "3")
    ]
    assert ready == [True, False, True, False]
    metadata = await caller.stub.ModelMetadata(pb.ModelMetadataRequest(name="sum"))
    assert list(metadata.versions) == ["1", "2"]


async def test_a_bad_file_is_reported_and_replaces_nothing(folder, followed) -> None:
    served = await followed()
    caller = Caller(served.channel)
    look = served.server._repository.look
    await caller.send(ask(1, 7, sequence_start=True))
    folder.put_bytes(2, b"no model at all")
    for _ in range(2):  # told once, tried again when it has changed
        await look()
    assert values(await caller.send(ask(2, 7))) == [3]
    assert values(await caller.send(ask(2))) == [2]
    states = await index(caller)
    assert states["sum", "1"] == "READY"
    assert states["sum", "2"].startswith("UNAVAILABLE")
    assert "not an ONNX" in states["sum", "2"]
    assert served.metric("sluice_model_load_failures_total", model="sum") == 1
    # In the place of the good one it is as bad.
    folder.put_bytes(1, b"broken in place")
    await look()
    assert values(await caller.send(ask(2))) == [2]
    assert served.metric("sluice_model_load_failures_total", model="sum") == 2
    folder.put(2)
    await look()
    assert values(await caller.send(ask(2))) == [4]
    assert values(await caller.send(ask(2, 7, sequence_end=True))) == [5]
    # Nor does an older one that is good.
    folder.put(1)
    folder.put_bytes(2, b"broken in place")
    await look()
    assert values(await caller.send(ask(2))) == [4]


async def test_a_file_with_another_signature_replaces_nothing(
    folder, followed, integers_file
) -> None:
    served = await followed()
    caller = Caller(served.channel)
    folder.put_bytes(2, integers_file.read_bytes())
    await served.server._repository.look()
    assert "under another name" in (await index(caller))["sum", "2"]
    assert values(await caller.send(ask(2))) == [2]


async def test_a_version_changed_in_place_and_one_taken_away_are_followed(folder, followed) -> None:
    served = await followed()
    caller = Caller(served.channel)
    look = served.server._repository.look
    await caller.send(ask(1, 7, sequence_start=True))
    folder.put(1, gain=5)
    await look()
    assert values(await caller.send(ask(2))) == [10]
    assert values(await caller.send(ask(2, 7))) == [3]
    folder.put(2)
    await look()
    folder.remove(2)
    await look()
    assert values(await caller.send(ask(2))) == [10]
    await served.server.hosts["sum"].sweep()
    assert [v.number for v in served.server.hosts["sum"].versions] == [1, 1]


async def test_models_come_and_go(folder, followed) -> None:
    served = await followed()
    caller, wire = Caller(served.channel), served.wire("sum")
    look = served.server._repository.look
    await wire.open(0)
    await caller.send(ask(1, 7, sequence_start=True))
    assert values(await caller.send(ask(1))) == [1]
    folder.put(4, name="other")
    folder.remove()
    await look()
    assert values(await caller.send(request(1, model="other"))) == [4]
    # What lives goes on, and nothing begins.
    await wire.push(0, floats([1]))
    assert (await wire.rows(0, 1)) == 1
    assert values(await caller.send(ask(1, 7))) == [2]
    for message in (ask(1), ask(1, 8, sequence_start=True), ask(1, 7, sequence_start=True)):
        code, text = await caller.fails(message)
        assert code is Code.UNAVAILABLE
        assert "being unloaded" in text
    assert not (await caller.stub.ModelReady(pb.ModelReadyRequest(name="sum"))).ready
    await caller.send(ask(1, 7, sequence_end=True))
    await wire.send(close=[0])
    await wire.next_closed(0)
    await look()
    assert set(served.server.hosts) == {"other"}
    assert await wire.status() is Code.OK
    code, _ = await caller.fails(ask(1))
    assert code is Code.NOT_FOUND
    health = health_pb2_grpc.HealthStub(served.channel)
    states = [
        (await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=SECONDS)).status
        for name in ("other", "sum")
    ]
    assert states == [1, 2]
    with pytest.raises(grpc.aio.AioRpcError):
        await served.models.GetModel(GetModelRequest(name="sum"), timeout=SECONDS)
    # And may come again.
    folder.put(3)
    await look()
    assert values(await caller.send(ask(1))) == [3]


async def test_the_folder_is_looked_at_by_itself(folder, followed) -> None:
    served = await followed(repository_poll_seconds=0.01)
    folder.put(2)
    await eventually(lambda: served.metric("sluice_model_version", model="sum") == 2)


async def test_requests_are_answered_without_a_break_while_versions_change(
    folder, followed
) -> None:
    served = await followed()
    caller = Caller(served.channel)
    changing = asyncio.ensure_future(change(folder, served))
    totals: dict[int, list[float]] = {}
    number = 0
    while not changing.done():
        number += 1
        steps = [ask(1, number, sequence_start=True), ask(1, number)]
        steps.append(ask(1, number, sequence_end=True))
        totals[number] = [values(await caller.send(step))[0] for step in steps]
    await changing
    for one, two, three in totals.values():
        assert (two, three) == (2 * one, 3 * one)
    assert {one for one, _, _ in totals.values()} <= {1, 2, 3, 4}


async def change(folder: Folder, served: Served) -> None:
    for version in (2, 3, 4):
        folder.put(version)
        await served.server._repository.look()


async def test_clients_load_and_unload_where_the_server_says_so(folder, followed) -> None:
    served = await followed("explicit")
    caller = Caller(served.channel)

    async def load(name: str = "sum") -> None:
        message = pb.RepositoryModelLoadRequest(model_name=name)
        await caller.stub.RepositoryModelLoad(message, timeout=SECONDS)

    async def unload() -> None:
        message = pb.RepositoryModelUnloadRequest(model_name="sum")
        await caller.stub.RepositoryModelUnload(message, timeout=SECONDS)

    async def refused(call: Awaitable[None]) -> tuple[Code, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return caught.value.code(), caught.value.details() or ""

    assert await index(caller) == {("sum", "1"): "UNAVAILABLE it is not loaded"}
    assert (await refused(unload()))[0] is Code.NOT_FOUND
    assert (await refused(load("nonsense")))[0] is Code.NOT_FOUND
    await load()
    assert values(await caller.send(ask(1, 7, sequence_start=True))) == [1]
    folder.put_bytes(2, b"bad")
    code, text = await refused(load())
    assert code is Code.FAILED_PRECONDITION
    assert "not an ONNX" in text
    folder.put(2)
    await load()
    assert values(await caller.send(ask(1))) == [2]
    await unload()
    assert values(await caller.send(ask(1, 7, sequence_end=True))) == [2]
    await served.server.hosts.sweep()
    assert not served.server.hosts
    await load()
    assert values(await caller.send(ask(1))) == [2]


@pytest.mark.parametrize("control", ["none", "poll"])
async def test_clients_load_nothing_where_the_server_does_not_say_so(followed, control) -> None:
    caller = Caller((await followed(control)).channel)
    for call, message in (
        (caller.stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="sum")),
        (caller.stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="sum")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(message, timeout=SECONDS)
        assert caught.value.code() is Code.FAILED_PRECONDITION
        assert "--model-control explicit" in (caught.value.details() or "")


async def test_at_the_start_an_older_version_serves_where_the_newest_is_bad(
    folder, followed
) -> None:
    folder.put_bytes(2, b"bad")
    caller = Caller((await followed("none")).channel)
    assert values(await caller.send(ask(1))) == [1]
    assert (await index(caller))["sum", "2"].startswith("UNAVAILABLE")


async def test_at_the_start_an_older_version_serves_where_the_newest_fails_its_warm_up(
    folder, followed, monkeypatch
) -> None:
    folder.put(2)
    warm_up = Version.warm_up

    def fail_the_newest(version: Version) -> None:
        if version.number == 2:
            raise ModelError("it cannot be run")
        warm_up(version)

    monkeypatch.setattr(Version, "warm_up", fail_the_newest)
    caller = Caller((await followed("none")).channel)
    answer = await caller.send(ask(1))
    assert (values(answer), answer.model_version) == ([1], "1")
    assert (await index(caller))["sum", "2"] == "UNAVAILABLE it cannot be run"


async def test_a_file_that_breaks_what_tests_it_is_a_bad_file(
    folder, followed, accumulator_file
) -> None:
    write_breaking_accumulator(accumulator_file, folder.path / "sum" / "2" / "model.onnx")
    served = await followed("poll")
    caller = Caller(served.channel)
    assert values(await caller.send(ask(1))) == [1]
    write_breaking_accumulator(accumulator_file, folder.path / "sum" / "3" / "model.onnx")
    folder.put(1, name="zebra")
    await served.server._repository.look()
    assert "export it again" in (await index(caller))["sum", "3"]
    assert "zebra" in served.server.hosts


async def test_a_server_without_one_good_version_of_a_model_does_not_start(
    folder, followed
) -> None:
    folder.put_bytes(1, b"bad")
    with pytest.raises(ModelError, match="not an ONNX"):
        await followed("poll")


async def test_one_name_is_one_model(folder, serve, accumulator_file) -> None:
    with pytest.raises(ModelError, match="rename one"):
        await serve({"sum": accumulator_file}, model_repository=folder.path)


def test_what_clients_load_is_loaded_by_the_one_worker_there_is(tmp_path) -> None:
    shared = {"workers": 2, "store": f"sqlite:///{tmp_path}/s.db", "durability": "strict"}
    assert Settings(model_control="poll", **shared).workers == 2
    with pytest.raises(ValidationError, match="one worker of several"):
        Settings(model_control="explicit", **shared)
