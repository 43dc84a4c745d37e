"""What the Open Inference Protocol tells of server and models."""

from importlib.metadata import version

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sluice_protos import open_inference_pb2 as pb
from tests.compat.caller import SECONDS, Caller, request
from tests.service.wire import floats

SERVICE = "inference.GRPCInferenceService"


async def test_the_server_is_live_and_ready(caller) -> None:
    assert (await caller.stub.ServerLive(pb.ServerLiveRequest(), timeout=SECONDS)).live
    assert (await caller.stub.ServerReady(pb.ServerReadyRequest(), timeout=SECONDS)).ready


@pytest.mark.parametrize(
    ("name", "number", "ready"),
    [
        ("accumulator", "", True),
        ("accumulator", "1", True),
        ("accumulator", "2", False),
        ("nonsense", "", False),
    ],
)
async def test_a_model_is_ready_when_it_is_there(caller, name, number, ready) -> None:
    question = pb.ModelReadyRequest(name=name, version=number)
    assert (await caller.stub.ModelReady(question, timeout=SECONDS)).ready is ready


async def test_the_server_tells_its_name_and_what_it_can(caller) -> None:
    answer = await caller.stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=SECONDS)
    assert (answer.name, answer.version) == ("sluice", version("sluice-serving"))
    assert {"sequence", "sequence(string_id)"} < set(answer.extensions)
    assert "model_repository" not in answer.extensions


async def test_a_model_tells_its_tensors_behind_a_batch(caller) -> None:
    question = pb.ModelMetadataRequest(name="integers")
    answer = await caller.stub.ModelMetadata(question, timeout=SECONDS)
    assert (answer.name, list(answer.versions), answer.platform) == (
        "integers",
        ["1"],
        "onnxruntime_onnx",
    )
    tensors = [(t.name, t.datatype, list(t.shape)) for t in (*answer.inputs, *answer.outputs)]
    assert tensors == [("INPUT", "INT32", [-1, 1]), ("OUTPUT", "INT32", [-1, 1])]


async def test_a_model_tells_its_configuration(sums) -> None:
    served = await sums(run_sequences_max=32, sequences_max=99, sequence_idle_seconds_max=2.5)
    question = pb.ModelConfigRequest(name="accumulator")
    config = (await Caller(served.channel).stub.ModelConfig(question, timeout=SECONDS)).config
    assert config.max_batch_size == 32
    assert not config.model_transaction_policy.decoupled
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", pb.TYPE_FP32, [1])]
    batching = config.sequence_batching
    assert batching.max_sequence_idle_microseconds == 2_500_000
    assert batching.oldest.max_candidate_sequences == 99
    (state,) = batching.state
    assert (state.input_name, list(state.dims), state.initial_state[0].zero_data) == (
        "sum",
        [1],
        True,
    )


async def test_every_served_model_is_in_the_index(caller) -> None:
    answer = await caller.stub.RepositoryIndex(
        pb.RepositoryIndexRequest(ready=True), timeout=SECONDS
    )
    models = {(model.name, model.version, model.state) for model in answer.models}
    assert models == {(name, "1", "READY") for name in ("accumulator", "integers", "stateless")}


async def test_a_server_without_a_repository_says_how_to_have_one(caller) -> None:
    for call, message in (
        (caller.stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="x")),
        (caller.stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="x")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(message, timeout=SECONDS)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "--model-repository" in (caught.value.details() or "")


async def test_questions_about_an_unknown_model_are_not_found(caller) -> None:
    stub = caller.stub
    for call, message in (
        (stub.ModelMetadata, pb.ModelMetadataRequest(name="nonsense")),
        (stub.ModelConfig, pb.ModelConfigRequest(name="nonsense")),
        (stub.ModelStatistics, pb.ModelStatisticsRequest(name="nonsense")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(message, timeout=SECONDS)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_statistics_count_what_was_done(sums) -> None:
    served = await sums()
    caller = Caller(served.channel)
    for number in range(4):
        await caller.infer([[[1], [2], [3]]], sequence_id=1, sequence_start=number == 0)
    await caller.fails(request(1, sequence_id=2))
    await caller.fails(request(1, model="accumulator", sequence_start=True))
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.push(0, floats([1, 2]))
    await wire.take(0, 2)
    (model,) = (
        await caller.stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=SECONDS)
    ).model_stats
    assert (model.name, model.version) == ("accumulator", "1")
    assert model.inference_count == 4 * 3 + 2
    assert model.execution_count == 5
    stats = model.inference_stats
    assert (stats.success.count, stats.fail.count) == (4, 2)
    assert stats.queue.count == 5
    # Programs that measure servers insist on this.
    assert stats.compute_input.count == stats.compute_infer.count == stats.compute_output.count == 5
    parts = (stats.compute_input.ns, stats.compute_infer.ns, stats.compute_output.ns)
    assert min(parts) > 0
    assert 0 < stats.queue.ns < stats.success.ns + stats.compute_infer.ns
    assert model.last_inference > 1_600_000_000_000


async def test_health_and_reflection_know_the_service(served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=SECONDS)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo(timeout=SECONDS)
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
    response = await call.read()
    assert response.file_descriptor_response.file_descriptor_proto
    await call.done_writing()
