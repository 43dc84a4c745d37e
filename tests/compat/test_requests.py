"""Requests of the Open Inference Protocol: tensors as they come, answers as they go, bad ones."""

import asyncio

import grpc
import numpy as np
import pytest

from sluice_protos.open_inference_pb2 import InferTensorContents, ModelInferRequest
from sluice_protos.sequences_pb2 import RESUME, OpenSequence
from tests.compat.caller import SECONDS, Caller, request, values
from tests.compat.inside import dispatcher, is_flushed
from tests.service.wire import eventually, floats

Code = grpc.StatusCode
Contents = InferTensorContents


async def test_a_request_without_a_sequence_begins_at_the_initial_state(caller) -> None:
    for _ in range(3):
        assert await caller.infer([[[1], [2]]]) == [1, 3]


async def test_a_batch_is_as_many_sequences_of_their_own(caller) -> None:
    assert await caller.infer([[1], [2], [3]]) == [1, 2, 3]
    answer = await caller.send(request([[[1], [2]], [[10], [20]]]))
    assert list(answer.outputs[0].shape) == [2, 2, 1]
    assert values(answer) == [1, 3, 10, 30]


async def test_requests_that_come_together_share_a_run(gate, sums, monkeypatch) -> None:
    # All of them begin at one instant, however slow this machine is.
    monkeypatch.setattr("sluice_service.runtime.cooperative._TURN_SECONDS", 1e6)
    served = await sums()
    caller = Caller(served.channel)
    (host,) = served.server.hosts.values()
    wire, stream = served.wire("accumulator"), caller.stream()
    await wire.open(0)
    await wire.push(0, floats([1]))
    await gate.reached()
    # While that runs, more come: single ones, on a stream, and on the native one.
    await stream.send(*(request(number) for number in range(30)))
    answers = asyncio.gather(*(caller.infer(number) for number in range(20)))
    await wire.push(0, floats([10]))
    await eventually(lambda: dispatcher(served).waiting_steps == 50)
    await eventually(lambda: host._scheduler.has_ready and is_flushed(served))
    await gate.let_through()
    await gate.let_through()
    assert await answers == [[number] for number in range(20)]
    assert await stream.take(30) == [[number] for number in range(30)]
    assert (await wire.rows(0, 2)).ravel().tolist() == [1, 11]
    assert served.metric("sluice_runs_total", model="accumulator") == 2


async def test_a_model_without_state_answers_too(caller) -> None:
    message = request([[1, 2]], model="stateless")
    assert values(await caller.send(message)) == [2, 3]


async def test_integers_work_as_floats_do(caller) -> None:
    async def step(value: int, **parameters: bool) -> list[int]:
        message = request(0, sequence_id=900, model="integers", **parameters)
        message.inputs[0].name, message.inputs[0].datatype = "INPUT", "INT32"
        message.raw_input_contents[0] = np.array([value], np.int32).tobytes()
        answer = await caller.send(message)
        assert answer.outputs[0].datatype == "INT32"
        return np.frombuffer(answer.raw_output_contents[0], np.int32).tolist()

    assert await step(11, sequence_start=True) == [11]
    assert await step(-5) == [6]
    assert await step(7, sequence_end=True) == [13]


async def test_typed_contents_are_as_good_as_raw_ones(caller) -> None:
    message = request([[[1], [2]]])
    del message.raw_input_contents[:]
    message.inputs[0].contents.CopyFrom(Contents(fp32_contents=[1, 2]))
    assert values(await caller.send(message)) == [1, 3]
    message.model_name = "integers"
    message.inputs[0].name, message.inputs[0].datatype = "INPUT", "INT32"
    message.inputs[0].contents.CopyFrom(Contents(int_contents=[1, 2]))
    answer = await caller.send(message)
    assert np.frombuffer(answer.raw_output_contents[0], np.int32).tolist() == [1, 3]


async def test_the_answer_has_the_id_the_model_and_its_version(caller) -> None:
    answer = await caller.send(request(1, label="my request"))
    assert (answer.id, answer.model_name, answer.model_version) == (
        "my request",
        "accumulator",
        "1",
    )
    assert [(tensor.name, tensor.datatype) for tensor in answer.outputs] == [("y", "FP32")]
    assert not answer.parameters


async def test_outputs_that_are_asked_for_come_and_others_are_refused(caller) -> None:
    message = request(1)
    message.outputs.add(name="y")
    assert values(await caller.send(message)) == [1]
    message.outputs.add(name="z")
    code, text = await caller.fails(message)
    assert code is Code.INVALID_ARGUMENT
    assert "'z'" in text


@pytest.mark.parametrize("wanted", [True, False])
async def test_the_final_answer_is_marked_where_it_is_wanted(caller, wanted) -> None:
    answer = await caller.send(request(1, triton_enable_empty_final_response=wanted))
    assert ("triton_final_response" in answer.parameters) is wanted


async def test_parameters_of_other_servers_change_nothing(caller) -> None:
    assert await caller.infer(1, priority=3, timeout=5, mine="x") == [1]


def _changed(**changes) -> ModelInferRequest:
    message = request(1)
    for key, value in changes.items():
        setattr(message.inputs[0], key, value)
    return message


def _shape(*shape: int, numbers: int = 1) -> ModelInferRequest:
    message = request(np.zeros(numbers).reshape(-1, 1))
    message.inputs[0].shape[:] = shape
    return message


def _typed(contents: InferTensorContents, model: str = "accumulator") -> ModelInferRequest:
    message = request(1, model=model)
    del message.raw_input_contents[:]
    message.inputs[0].contents.CopyFrom(contents)
    return message


def _in_shared_memory() -> ModelInferRequest:
    message = request(1)
    message.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    return message


def _classified() -> ModelInferRequest:
    message = request(1)
    message.outputs.add(name="y").parameters["classification"].int64_param = 2
    return message


def _twice() -> ModelInferRequest:
    message = request(1)
    message.inputs.append(message.inputs[0])
    return message


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (_changed(datatype="FP64"), "takes 'FP32'"),
        (_changed(datatype="BYTES"), "no strings"),
        (_changed(name="z"), "['x']"),
        (_twice(), "each once"),
        (ModelInferRequest(model_name="accumulator"), "['x']"),
        (_shape(1), "[batch, 1]"),
        (_shape(1, 2), "[batch, 1]"),
        (_shape(1, 1, 1, 1), "[batch, steps, 1]"),
        (_shape(0, 1, numbers=0), "at least one"),
        (_shape(1, 0, 1, numbers=0), "at least one"),
        (_shape(-1, 1), "at least one"),
        (_shape(3, 1), "12"),
        (_shape(2000, 1, numbers=2000), "1024"),
        (_typed(Contents(fp32_contents=[1, 2])), "2 values"),
        (_typed(Contents(fp64_contents=[1])), "fp32_contents"),
        (_in_shared_memory(), "shared memory"),
        (_classified(), "classification"),
        (request(np.inf), "infinity"),
    ],
)
async def test_a_bad_request_is_told_what_is_wrong(caller, message, words) -> None:
    code, text = await caller.fails(message)
    assert code is Code.INVALID_ARGUMENT
    assert words in text
    assert await caller.infer(1) == [1]


@pytest.mark.parametrize(("name", "number"), [("nonsense", ""), ("accumulator", "2")])
async def test_an_unknown_model_or_version_is_not_found(caller, name, number) -> None:
    message = request(1)
    message.model_name, message.model_version = name, number
    code, text = await caller.fails(message)
    assert code is Code.NOT_FOUND
    assert name in text


async def test_bytes_that_are_no_request_are_refused(served) -> None:
    call = served.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\xff\xff", timeout=SECONDS)
    assert caught.value.code() is Code.INVALID_ARGUMENT


# Streams.


async def test_an_error_on_a_stream_is_an_answer_and_the_stream_goes_on(caller) -> None:
    stream = caller.stream()
    await stream.send(request(1, model="nonsense", label="bad"), request(1, label="good"))
    bad, good = await stream.read(), await stream.read()
    assert "no model 'nonsense'" in bad.error_message
    assert bad.infer_response.id == "bad"
    assert not good.error_message
    assert good.infer_response.id == "good"


async def test_a_client_that_wants_errors_as_status_gets_them_so(caller) -> None:
    stream = caller.stream(metadata=(("triton_grpc_error", "true"),))
    await stream.send(request(1), request(1, sequence_id=5), request(1))
    assert await stream.take(1) == [[1]]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.call.read()
    assert caught.value.code() is Code.INVALID_ARGUMENT


async def test_one_stream_serves_several_models(caller) -> None:
    stream = caller.stream()
    await stream.send(request(1), request([[1, 2]], model="stateless"))
    assert await stream.take(2) == [[1], [2, 3]]


async def test_a_client_that_sends_no_more_gets_its_answers(caller) -> None:
    stream = caller.stream()
    await stream.send(*(request(number) for number in range(20)))
    await stream.call.done_writing()
    assert await stream.take(20) == [[number] for number in range(20)]
    assert await stream.call.read() is grpc.aio.EOF
    assert await stream.call.code() is Code.OK


async def test_more_than_may_wait_is_answered_all_the_same(sums) -> None:
    caller = Caller((await sums(stream_queue_steps_max=8)).channel)
    stream = caller.stream()
    answers = await stream.ask(request([[[1], [number]]]) for number in range(100))
    assert answers == [[1, 1 + number] for number in range(100)]


async def test_who_is_overtaken_is_not_told_to_start_again(gate, sums) -> None:
    served = await sums()
    caller = Caller(served.channel)
    stream, other = caller.stream(), served.wire("accumulator")
    await stream.send(request(1, sequence_id=1, sequence_start=True))
    await gate.let_through()
    assert await stream.take(1) == [[1]]
    await stream.send(*(request(1, sequence_id=1) for _ in range(2)))
    await eventually(lambda: dispatcher(served).waiting_steps == 2)
    await gate.reached()
    await other.send(open=[OpenSequence(lane=0, sequence_id="int64:1", mode=RESUME)])
    (host,) = served.server.hosts.values()
    await eventually(lambda: host._runs._waiting)
    await gate.let_through()
    assert (await other.next_opened(0)).applied == 2
    assert not (await stream.read()).error_message
    error = (await stream.read()).error_message
    assert "taken over" in error and "START" not in error


async def test_a_stop_answers_what_was_asked_and_refuses_what_comes_after(
    gate, sums, unhurried
) -> None:
    served = await sums()
    caller = Caller(served.channel)
    (host,) = served.server.hosts.values()
    stream, later = caller.stream(), caller.stream()
    for each, fields in ((later, {}), (stream, {"sequence_id": 1, "sequence_start": True})):
        await each.send(request(1, **fields))
        await gate.let_through()
        assert await each.take(1) == [[1]]
    await stream.send(*(request(1, sequence_id=1) for _ in range(3)))
    await eventually(lambda: dispatcher(served).waiting_steps == 3)
    await gate.reached()
    stopping = asyncio.ensure_future(served.stop())
    await eventually(lambda: host.is_draining)
    await gate.let_through()
    responses = [await stream.read() for _ in range(3)]
    assert await later.call.read() is grpc.aio.EOF
    await stopping
    done = [not response.error_message for response in responses]
    assert done == [True, False, False]
    assert all(
        "stopping" in r.error_message for r, ok in zip(responses, done, strict=True) if not ok
    )
