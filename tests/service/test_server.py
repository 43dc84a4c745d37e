"""The server as operators see it: health, reflection, pages, metrics, what it tells of models."""

import asyncio
import re

import aiohttp
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sluice_model import ModelError, read_contract
from sluice_protos.sequences_pb2 import GetModelRequest, ListModelsRequest, OpenSequence, Tensor
from sluice_service.server import Server
from sluice_service.settings import Settings
from sluice_service.store import Key
from tests.processes import free_port
from tests.service.store.memory import MemoryStore
from tests.service.wire import SECONDS, Served, floats

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def _get(served: Served, path: str, **headers: str) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(served.http + path, headers=headers) as response,
    ):
        return response.status, await response.text()


# Health and reflection.


@pytest.mark.parametrize(
    "name", ["", "accumulator", "lstm", "sluice.v1.Sequences", "sluice.v1.Models"]
)
async def test_health_of_the_server_and_of_each_model_can_be_checked(served, name) -> None:
    stub = health_pb2_grpc.HealthStub(served.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=SECONDS)
    assert answer.status == SERVING


async def test_health_of_what_is_not_there_is_not_found(served) -> None:
    stub = health_pb2_grpc.HealthStub(served.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nonsense"), timeout=SECONDS)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_who_watches_is_told_when_the_server_stops(sums, unhurried) -> None:
    served = await sums()
    stub = health_pb2_grpc.HealthStub(served.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(service=n)) for n in ("", "accumulator")]
    async with asyncio.timeout(SECONDS):
        assert [(await watch.read()).status for watch in watches] == [SERVING] * 2
        assert (await _get(served, "/readyz"))[0] == 200
        served.is_stopped = True
        stopping = asyncio.ensure_future(served.server.stop())
        assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * 2
        # Alive, but no longer ready: whoever balances load sends nothing new.
        status, text = await _get(served, "/readyz")
        assert (status, "stopping" in text) == (503, True)
        assert (await _get(served, "/healthz"))[0] == 200
        assert served.metric("sluice_ready") == 0
        # Only these calls keep the server from its end.
        for watch in watches:
            watch.cancel()
        await stopping


async def test_reflection_lists_every_service(served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo()
    async with asyncio.timeout(SECONDS):
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {"sluice.v1.Sequences", "sluice.v1.Models", "grpc.health.v1.Health"} <= names
        symbol = "sluice.v1.Sequences"
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()


# Models.


async def test_every_model_is_listed_with_what_its_self_test_found(served, lstm_file) -> None:
    answer = await served.models.ListModels(ListModelsRequest(), timeout=SECONDS)
    models = {info.name: info for info in answer.models}
    assert set(models) == {"accumulator", "lstm", "gru", "rnn", "embedding", "multi"}
    info = models["lstm"]
    assert info.digest == read_contract(lstm_file.path).digest
    assert info.is_ready
    for name in ("lstm", "gru", "embedding", "accumulator"):
        assert models[name].is_bit_exact
        assert re.fullmatch("[0-9a-f]{64}", models[name].arithmetic)
        assert served.metric("sluice_model_bit_exact", model=name) == 1


async def test_a_contract_is_told_as_it_is_in_the_file(served, lstm_file) -> None:
    contract = await served.models.GetModel(GetModelRequest(name="lstm"), timeout=SECONDS)
    assert contract == read_contract(lstm_file.path)


async def test_an_unknown_model_is_not_found_and_those_there_are_are_named(served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.models.GetModel(GetModelRequest(name="nonsense"), timeout=SECONDS)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "accumulator" in caught.value.details()


# Metrics.

# What there must be, whatever else there is.
NAMES = {
    "sluice_steps": "counter",
    "sluice_chunks": "counter",
    "sluice_runs": "counter",
    "sluice_padding_steps": "counter",
    "sluice_run_sequences": "histogram",
    "sluice_run_seconds": "histogram",
    "sluice_queue_seconds": "histogram",
    "sluice_response_seconds": "histogram",
    "sluice_sequences_live": "gauge",
    "sluice_sequences_parked": "gauge",
    "sluice_sequences_opened": "counter",
    "sluice_sequences_closed": "counter",
    "sluice_state_bytes": "gauge",
    "sluice_faults": "counter",
    "sluice_model_load_seconds": "gauge",
    "sluice_build": "info",
}


async def test_the_page_has_every_metric_and_none_is_labelled_by_sequence(sums) -> None:
    served = await sums()
    wire = served.wire("accumulator")
    await wire.open(0, "a-telling-name", writer=b"w")
    await wire.push(0, floats([1, 2]))
    await wire.rows(0, 2)
    await wire.send(lane=[9], inputs=[Tensor(data=floats([1]).tobytes())], close=[0])
    await wire.next_closed(0)
    status, page = await _get(served, "/metrics", Accept="application/openmetrics-text")
    assert status == 200
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, flags=re.MULTILINE))
    assert {name: types.get(name) for name in NAMES} == NAMES
    assert page.endswith("# EOF\n")
    assert "a-telling-name" not in page
    labels = set(re.findall(r'[{,](\w+)="', page))
    assert labels.isdisjoint({"sequence", "sequence_id", "id", "stream", "lane"})
    # What Prometheus asks for without content negotiation, too.
    status, page = await _get(served, "/metrics")
    assert status == 200
    assert "\nsluice_steps_total{" in page


async def test_metrics_move_as_things_happen(sums) -> None:
    served = await sums(run_seconds_max=60)  # however long the machine took at load
    wire = served.wire("accumulator")

    def read(name: str, **labels: str) -> float:
        return served.metric(f"sluice_{name}", model="accumulator", **labels)

    assert read("model_load_seconds") > 0
    assert read("sequences_live") == 0
    await wire.send(open=[OpenSequence(lane=n, sequence_id=str(n), writer=b"w") for n in range(4)])
    for lane in range(4):
        await wire.next_opened(lane)
    assert (read("sequences_live"), read("streams_open")) == (4, 1)
    assert read("sequences_opened_total", origin="create") == 4
    assert read("state_bytes") == 4 * 4
    # One frame of four chunks: one run with three steps of padding.
    await wire.send(
        lane=range(4), steps=[10, 10, 10, 7], inputs=[Tensor(data=np.zeros(37, "f4").tobytes())]
    )
    for lane, steps in enumerate([10, 10, 10, 7]):
        await wire.rows(lane, steps)
    assert (read("chunks_total"), read("steps_total"), read("runs_total")) == (4, 37, 1)
    assert read("padding_steps_total") == 3
    assert (read("run_sequences_count"), read("run_sequences_sum")) == (1, 4)
    assert read("run_sequences_bucket", le="2") == 0
    assert read("run_sequences_bucket", le="4") == 1
    assert read("run_seconds_count") == 1
    assert read("run_seconds_sum") > 0
    assert read("queue_seconds_count") == 4
    assert read("response_seconds_count") == 4
    assert read("response_seconds_sum") >= read("queue_seconds_sum") > 0
    # Endings, by reason.
    await wire.send(park=[0], close=[1])
    await wire.next_closed(0)
    await wire.next_closed(1)
    assert (read("sequences_live"), read("sequences_parked")) == (3, 1)
    assert read("sequences_closed_total", reason="parked") == 1
    assert read("sequences_closed_total", reason="client") == 1
    await wire.open(0, "0", writer=b"w", attempt=1, mode=1)
    assert read("sequences_opened_total", origin="resume") == 1
    assert (read("sequences_live"), read("sequences_parked")) == (3, 0)
    wire.cut()
    await served.parked("accumulator", "0", "2", "3")
    assert (read("sequences_parked"), read("streams_open")) == (3, 0)


async def test_build_info_names_the_versions_of_what_runs(served) -> None:
    _, page = await _get(served, "/metrics")
    (line,) = re.findall(r"^sluice_build_info\{.*\} 1.0$", page, flags=re.MULTILINE)
    for package in ("sluice_serving", "onnxruntime", "grpcio", "numpy"):
        assert re.search(rf'{package}="\d+\.\d+', line)


async def test_what_is_not_a_page_is_not_found(served) -> None:
    assert (await _get(served, "/nonsense"))[0] == 404
    assert await _get(served, "/healthz") == (200, "alive\n")
    assert (await _get(served, "/readyz"))[0] == 200


# Starting and stopping.


async def test_one_bad_model_among_several_ends_the_start(accumulator_file, tmp_path) -> None:
    models = {"good": accumulator_file, "bad": tmp_path / "none.onnx", "too": accumulator_file}
    with pytest.raises(ModelError, match=r"none\.onnx: cannot be read"):
        Server(Settings(model=models, listen="127.0.0.1:0", http="127.0.0.1:0"))


async def test_a_program_may_bring_a_store_of_its_own(sums) -> None:
    store = MemoryStore(tombstone_seconds=600, record_seconds=600)
    served = await sums(own_store=store, durability="strict")
    wire = served.wire("accumulator")
    await wire.open(0, "s", writer=b"w")
    await wire.push(0, floats([1, 2]))
    await wire.rows(0, 2)
    stored = await store.read(Key("accumulator", "s"))
    assert stored is not None
    assert stored.checkpoint.step == 2


async def test_a_port_that_is_taken_is_told_and_leaves_nothing_open(
    served, accumulator_file
) -> None:
    for taken in ("listen", "http"):
        address = served.address if taken == "listen" else served.http.removeprefix("http://")
        free = {"listen": "127.0.0.1:0", "http": "127.0.0.1:0", taken: address}
        server = Server(Settings(model={"accumulator": accumulator_file}, **free))
        with pytest.raises(OSError, match=rf"{address} .*--{taken}"):
            await server.start()
    _, page = await _get(served, "/healthz")
    assert page == "alive\n"


async def test_a_server_can_be_stopped_twice_over_the_same_address(sums) -> None:
    # Ports that no connection of another process is given in between.
    address, http = (f"127.0.0.1:{free_port()}" for _ in range(2))
    first = await sums(listen=address, http=http)
    first.is_stopped = True
    await first.channel.close()
    await first.server.stop()
    second = await sums(listen=address, http=http)
    wire = second.wire("accumulator")
    await wire.open(0)
    await wire.push(0, floats([1]))
    assert (await wire.rows(0, 1)) == 1
