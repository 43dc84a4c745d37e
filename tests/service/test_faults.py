"""Bad input gets the right answer, changes nothing, and leaves the other lanes alone."""

import asyncio
from pathlib import Path

import numpy as np
import onnx
import pytest
from grpc import StatusCode

from sluice_model import read_contract, write_contract
from sluice_protos.sequences_pb2 import (
    RESTART,
    RESUME,
    START,
    Closed,
    Fault,
    InferRequest,
    OpenSequence,
    SequenceState,
    Tensor,
)
from tests.models import run_offline
from tests.service.wire import floats

DATA = floats([1]).tobytes()


def _tensor(**changes) -> Tensor:
    return Tensor(**{"name": "x", "datatype": "FP32", "shape": [1], "data": DATA, **changes})


# What is sent for one chunk of one step of the accumulator, and what the answer must name.
BAD_ARRAYS = {
    "datatype": ([_tensor(datatype="INT64")], "takes FP32"),
    "unknown datatype": ([_tensor(datatype="FP33")], "takes FP32"),
    "shape": ([_tensor(shape=[2])], "takes [1]"),
    "rank": ([_tensor(shape=[1, 1])], "takes [1]"),
    "name": ([_tensor(name="z")], "takes ['x']"),
    "size": ([_tensor(data=DATA + b"\0")], "has 5 bytes"),
    "too short": ([_tensor(data=DATA[:3])], "has 3 bytes"),
    "no data": ([_tensor(data=b"")], "has 0 bytes"),
    "no tensor": ([], "takes ['x']"),
    "one too many": ([_tensor(), _tensor(name="z")], "takes ['x']"),
    "the same twice": ([_tensor(), _tensor()], "['x', 'x'] were sent"),
    "unnamed twice": ([Tensor(data=DATA), Tensor(data=DATA)], "takes ['x']"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
async def test_wrong_arrays_fault_every_lane_of_the_message_and_apply_nothing(
    case, served, request
) -> None:
    tensors, words = BAD_ARRAYS[case]
    name = request.node.name
    wire = served.wire("accumulator")
    await wire.open(0, f"{name}-0")
    await wire.open(1, f"{name}-1")
    await wire.open(2, f"{name}-2")
    for lane in (0, 1, 2):
        await wire.push(lane, floats([5]))
        await wire.rows(lane, 1)
    before = [await served.state("accumulator", f"{name}-{n}") for n in (0, 1, 2)]
    for tensor in tensors:
        tensor.data = tensor.data * 2 if tensor.data else b""
    await wire.send(lane=[0, 1], inputs=tensors)
    for lane in (0, 1):
        fault = await wire.next_fault(lane)
        assert fault.reason == Fault.INVALID_INPUT
        assert fault.code == StatusCode.INVALID_ARGUMENT.value[0]
        assert words.replace("5 bytes", "10 bytes").replace("3 bytes", "6 bytes") in fault.message
        assert fault.expected_step == 1
    assert [await served.state("accumulator", f"{name}-{n}") for n in (0, 1, 2)] == before
    # The lane that had no chunk in that message never noticed.
    await wire.push(2, floats([1]))
    assert (await wire.rows(2, 1)).tolist() == [[6]]
    # The others go on where they stood, once their client says so.
    await wire.push(0, floats([2]), first=1)
    assert (await wire.rows(0, 1)).tolist() == [[7]]


@pytest.mark.parametrize(
    "lists",
    [{"steps": [1]}, {"steps": [1, 1, 1]}, {"first_step": [0]}, {"first_step": [0, 0, 0]}],
)
async def test_lists_of_different_lengths_fault_the_lanes(served, lists) -> None:
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.open(1)
    await wire.send(lane=[0, 1], inputs=[Tensor(data=floats([1, 2]).tobytes())], **lists)
    for lane in (0, 1):
        fault = await wire.next_fault(lane)
        assert fault.reason == Fault.INVALID_INPUT
        assert next(iter(lists)) in fault.message
    await wire.push(0, floats([3]), first=0)
    assert (await wire.rows(0, 1)).tolist() == [[3]]


async def test_inputs_without_a_lane_end_the_stream_with_the_reason(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.send(inputs=[Tensor(data=DATA)])
    assert await wire.status() == StatusCode.INVALID_ARGUMENT
    assert "lane" in await wire.call.details()


async def test_a_first_message_that_cannot_be_is_told_of_while_the_limits_are_being_sent(
    served,
) -> None:
    wires = [served.wire("accumulator") for _ in range(30)]
    await asyncio.gather(*(wire.send(inputs=[Tensor(data=DATA)]) for wire in wires))
    statuses = await asyncio.gather(*(wire.status() for wire in wires))
    assert set(statuses) == {StatusCode.INVALID_ARGUMENT}


async def test_a_message_of_more_chunks_than_there_are_lanes_is_refused_unread(served) -> None:
    wire = served.wire("accumulator")
    await wire.send(lane=[0] * (2**20 + 1))
    assert await wire.status() == StatusCode.INVALID_ARGUMENT
    assert "send at most 1048576 in one" in await wire.call.details()


async def test_an_unknown_lane_is_told_and_the_others_go_on(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0)
    data = Tensor(data=floats([1, 2, 3]).tobytes())
    await wire.send(lane=[7, 0, 2_000_000], inputs=[data])
    for lane in (7, 2_000_000):
        fault = await wire.next_fault(lane)
        assert (fault.reason, fault.code) == (Fault.UNKNOWN_LANE, StatusCode.NOT_FOUND.value[0])
        assert "open it first" in fault.message
    assert (await wire.rows(0, 1)).tolist() == [[2]]
    await wire.send(close=[8], park=[9])
    assert (await wire.next_fault(8)).reason == Fault.UNKNOWN_LANE
    assert (await wire.next_fault(9)).reason == Fault.UNKNOWN_LANE


async def test_a_lane_number_beyond_all_bounds_is_refused(served) -> None:
    wire = served.wire("accumulator")
    assert (await wire.refused(2**32 - 1)).reason == Fault.INVALID_INPUT
    await wire.push(2**32 - 1, floats([1]))
    assert (await wire.next_fault(2**32 - 1)).reason == Fault.UNKNOWN_LANE


async def test_an_unknown_model_ends_the_stream_and_names_those_there_are(served) -> None:
    wire = served.wire("nonsense")
    await wire.send(open=[OpenSequence(lane=0)])
    assert await wire.status() == StatusCode.NOT_FOUND
    details = await wire.call.details()
    assert "'nonsense'" in details
    assert "accumulator" in details
    assert "lstm" in details


async def test_a_first_message_without_model_is_refused(served) -> None:
    wire = served.wire("")
    await wire.send(open=[OpenSequence(lane=0)])
    assert await wire.status() == StatusCode.INVALID_ARGUMENT
    assert "names its model" in await wire.call.details()


async def test_a_stream_keeps_to_one_model(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "one-model", writer=b"w")
    await wire.send(model="lstm")
    assert await wire.status() == StatusCode.INVALID_ARGUMENT
    assert "another" in await wire.call.details()
    # Its sequences are parked, as after any end of a stream.
    await served.parked("accumulator", "one-model")


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff", InferRequest(model="accumulator").SerializeToString()[:-1]]
)
async def test_truncated_bytes_end_the_stream_and_park_its_lanes(served, data) -> None:
    wire = served.wire("accumulator")
    name = f"truncated-{data!r}"
    await wire.open(0, name, writer=b"w", mode=RESTART)
    await wire.push(0, floats([4]))
    await wire.rows(0, 1)
    before = await served.state("accumulator", name)
    await wire.send_bytes(data)
    assert await wire.status() == StatusCode.INVALID_ARGUMENT
    assert "InferRequest" in await wire.call.details()
    again = served.wire("accumulator")
    opened = await again.open(0, name, writer=b"w", mode=RESUME, attempt=1, received=1)
    assert opened.applied == 1
    assert await served.state("accumulator", name) == before


async def test_an_oversize_message_ends_the_stream_and_names_the_limit(sums) -> None:
    served = await sums(request_bytes_max=10_000)
    wire = served.wire("accumulator")
    await wire.open(0, "oversize", writer=b"w")
    assert wire.limits.request_bytes_max == 10_000
    await wire.push(0, floats([4]))
    await wire.rows(0, 1)
    await wire.push(0, floats(range(3000)))
    assert await wire.status() == StatusCode.RESOURCE_EXHAUSTED
    assert "10000" in await wire.call.details()
    await served.parked("accumulator", "oversize")
    assert (await served.state("accumulator", "oversize")).step == 1


async def test_a_chunk_of_no_steps_is_refused_and_the_state_stays(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "zero-length")
    await wire.push(0, floats([4]))
    await wire.rows(0, 1)
    # Between chunks that are good, and with another lane's rows behind it.
    await wire.open(1)
    await wire.send(lane=[1, 0, 1], steps=[1, 0, 1], inputs=[Tensor(data=floats([1, 2]).tobytes())])
    fault = await wire.next_fault(0)
    assert fault.reason == Fault.INVALID_INPUT
    assert "at least one" in fault.message
    assert fault.expected_step == 1
    assert (await wire.rows(1, 2)).ravel().tolist() == [1, 3]
    await wire.push(0, floats([3]), first=1)
    assert (await wire.rows(0, 1)).tolist() == [[7]]


async def test_a_chunk_beyond_the_limit_is_refused_and_the_limit_named(sums) -> None:
    served = await sums(chunk_steps_max=10)
    wire = served.wire("accumulator")
    await wire.open(0)
    assert wire.limits.chunk_steps_max == 10
    await wire.push(0, floats(range(11)))
    fault = await wire.next_fault(0)
    assert (fault.reason, fault.code) == (Fault.LIMIT, StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert "chunk_steps_max is 10" in fault.message
    await wire.push(0, floats(range(10)), first=0)
    assert (await wire.rows(0, 10))[-1] == 45


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_non_finite_input_faults_its_chunk_only(served, lstm_file, value) -> None:
    x = np.random.default_rng(1).standard_normal((4, 20, 8)).astype(np.float32)
    ids = [f"finite-{value}-{n}" for n in range(4)]
    wire = served.wire("lstm")
    await wire.send(open=[OpenSequence(lane=n, sequence_id=ids[n]) for n in range(4)])
    bad = x[:, :10].copy()
    bad[1, 7, 3] = bad[3, 0, 0] = value
    await wire.send(lane=range(4), steps=[10] * 4, inputs=[Tensor(data=bad.tobytes())])
    for lane, step in ((1, 7), (3, 0)):
        fault = await wire.next_fault(lane)
        assert fault.reason == Fault.INVALID_INPUT
        assert f"step {step} of the chunk" in fault.message
        assert fault.expected_step == 0
        assert (await served.state("lstm", ids[lane])).step == 0
    for lane in (1, 3):
        await wire.push(lane, x[lane, :10], first=0)
    await wire.send(lane=range(4), steps=[10] * 4, inputs=[Tensor(data=x[:, 10:].tobytes())])
    for lane in range(4):
        (offline,) = run_offline(lstm_file.path, {"x": x[lane]})
        assert (await wire.rows(lane, 20) == offline).all()


async def test_a_flood_of_bad_values_is_one_fault_for_each_chunk(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.open(1)
    rows = np.full((200_000, 1), np.nan, np.float32)
    await wire.send(lane=[0, 1], steps=[100_000] * 2, inputs=[Tensor(data=rows.tobytes())])
    assert "step 0 " in (await wire.next_fault(0)).message
    assert "step 0 " in (await wire.next_fault(1)).message
    await wire.settle()
    assert not any(wire.faults.values())


@pytest.mark.parametrize("token", [-1, 32, 2**62])
async def test_a_token_out_of_range_faults_its_chunk_only(served, embedding_file, token) -> None:
    tokens = np.arange(20) % 32
    wire = served.wire("embedding")
    await wire.open(0)
    await wire.open(1)
    bad = tokens.copy()
    bad[4] = token
    await wire.send(
        lane=[0, 1], steps=[20, 20], inputs=[Tensor(data=np.concatenate([bad, tokens]).tobytes())]
    )
    fault = await wire.next_fault(0)
    assert fault.reason == Fault.INVALID_INPUT
    assert "outside 0 to 31 in step 4" in fault.message
    (offline,) = run_offline(embedding_file.path, {"tokens": tokens})
    assert (await wire.rows(1, 20) == offline).all()
    await wire.push(0, tokens, first=0)
    assert (await wire.rows(0, 20) == offline).all()


BIG = 3e38  # twice that is infinite in float32


async def test_a_state_that_becomes_infinite_is_refused_and_stays_as_it_was(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "overflow")
    await wire.open(1, "overflow-neighbour")
    await wire.push(0, floats([BIG]))
    await wire.rows(0, 1)
    steps = served.metric("sluice_steps_total", model="accumulator")
    await wire.send(lane=[0, 1], inputs=[Tensor(data=floats([BIG, 2]).tobytes())])
    fault = await wire.next_fault(0)
    assert (fault.reason, fault.code) == (Fault.NON_FINITE, StatusCode.INVALID_ARGUMENT.value[0])
    assert fault.expected_step == 1
    state = await served.state("accumulator", "overflow")
    assert (state.step, state.row) == (1, floats([BIG]).tobytes())
    assert (await wire.rows(1, 1)).tolist() == [[2]]
    # The neighbour's step counts, though it shared a run with one that was refused.
    assert served.metric("sluice_steps_total", model="accumulator") == steps + 1
    await wire.push(0, floats([-BIG]), first=1)
    assert (await wire.rows(0, 1)).tolist() == [[0]]


async def test_non_finite_values_pass_where_the_operator_allows_them(sums) -> None:
    served = await sums(non_finite="allow")
    wire = served.wire("accumulator")
    await wire.open(0, "allowed")
    await wire.push(0, floats([BIG, BIG, 1, np.nan]))
    rows = (await wire.rows(0, 4)).ravel()
    assert np.isposinf(rows[1:3]).all()
    assert np.isnan(rows[3])
    assert (await served.state("accumulator", "allowed")).step == 4


@pytest.fixture
def unchecked_file(embedding_file, tmp_path) -> Path:
    """Tokens without their range in the contract: only the run itself finds a bad one."""
    proto = onnx.load_model(embedding_file.path)
    contract = read_contract(embedding_file.path)
    contract.inputs[0].ClearField("valid")
    write_contract(proto, contract)
    path = tmp_path / "unchecked.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


async def test_a_run_that_fails_faults_the_lanes_to_blame_and_no_other(
    serve, unchecked_file
) -> None:
    served = await serve({"unchecked": unchecked_file})
    wire = served.wire("unchecked")
    await wire.send(open=[OpenSequence(lane=n, sequence_id=str(n)) for n in range(7)])
    tokens = np.random.default_rng(2).integers(0, 32, (7, 6))
    bad = tokens.copy()
    bad[2, 5] = bad[5, 0] = 1000
    await wire.send(lane=range(7), steps=[6] * 7, inputs=[Tensor(data=bad.tobytes())])
    for lane in (2, 5):
        fault = await wire.next_fault(lane)
        assert (fault.reason, fault.code) == (Fault.RUN_FAILED, StatusCode.INTERNAL.value[0])
        assert fault.expected_step == 0
        assert (await served.state("unchecked", str(lane))).step == 0
        await wire.push(lane, tokens[lane], first=0)
    for lane in range(7):
        (offline,) = run_offline(unchecked_file, {"tokens": tokens[lane]})
        assert (await wire.rows(lane, 6) == offline).all()


async def test_a_second_start_of_a_live_id_is_refused(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "twice", writer=b"a")
    await wire.push(0, floats([1]))
    for writer in (b"b", b""):
        fault = await wire.refused(1, "twice", writer=writer, mode=START)
        assert fault.reason == Fault.ALREADY_EXISTS
        assert fault.code == StatusCode.ALREADY_EXISTS.value[0]
        assert "'twice'" in fault.message
    await wire.push(0, floats([2]))
    assert (await wire.rows(0, 2)).ravel().tolist() == [1, 3]
    # What was sent with a refused open is dropped in silence.
    await wire.push(1, floats([9]))
    await wire.settle()
    assert not wire.faults[1]
    assert not wire.pieces[1]


async def test_an_open_of_a_lane_in_use_is_refused_and_the_lane_goes_on(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "in-use")
    await wire.push(0, floats([1]))
    fault = await wire.refused(0, "another")
    assert fault.reason == Fault.LANE_IN_USE
    await wire.push(0, floats([2]))
    assert (await wire.rows(0, 2)).ravel().tolist() == [1, 3]
    assert "another" not in await served.list("accumulator")


async def test_an_unknown_sequence_is_not_found(served) -> None:
    wire = served.wire("accumulator")
    fault = await wire.refused(0, "never-seen", mode=RESUME, writer=b"w")
    assert (fault.reason, fault.code) == (Fault.NOT_FOUND, StatusCode.NOT_FOUND.value[0])
    assert "START" in fault.message


async def test_an_open_mode_that_does_not_exist_is_refused_and_the_others_go_on(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0)
    data = OpenSequence(lane=1).SerializeToString() + bytes([0x18, 99])  # mode = 99
    request = InferRequest(open=[OpenSequence.FromString(data)])
    await wire.send_bytes(request.SerializeToString())
    assert (await wire.next_fault(1)).reason == Fault.INVALID_INPUT
    await wire.push(0, floats([1]))
    assert (await wire.rows(0, 1)).tolist() == [[1]]


@pytest.mark.parametrize("field", [{"sequence_id": "s" * 100_000}, {"writer": b"w" * 100_000}])
async def test_names_beyond_all_bounds_are_refused_in_few_words(served, field) -> None:
    wire = served.wire("accumulator")
    await wire.send(open=[OpenSequence(lane=0, **field)])
    fault = await wire.next_fault(0)
    assert fault.reason == Fault.INVALID_INPUT
    assert len(fault.message) < 2000


async def test_a_message_about_a_name_beyond_all_bounds_stays_short(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.send(lane=[0], inputs=[_tensor(name="z" * 1_000_000)])
    assert len((await wire.next_fault(0)).message) < 2000
    other = served.wire("m" * 1_000_000)
    await other.send()
    assert await other.status() == StatusCode.NOT_FOUND
    assert len(await other.call.details()) < 2000


# Gaps, rewinds and what follows a fault.


async def test_a_gap_is_one_fault_and_what_follows_is_dropped_until_the_expected_step(
    served,
) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "gap")
    await wire.push(0, floats([1, 2]), first=0)
    for first in (3, 4, 5):  # step 2 is missing
        await wire.push(0, floats([100]), first=first)
    await wire.push(0, floats([100]))
    fault = await wire.next_fault(0)
    assert fault.reason == Fault.GAP
    assert fault.code == StatusCode.FAILED_PRECONDITION.value[0]
    assert fault.expected_step == 2
    assert "first_step 2" in fault.message
    await wire.settle()
    assert not wire.faults[0]
    assert (await wire.rows(0, 2)).ravel().tolist() == [1, 3]
    assert (await served.state("accumulator", "gap")).step == 2
    await wire.push(0, floats([4, 5]), first=2)
    await wire.push(0, floats([6]))
    assert (await wire.rows(0, 3)).ravel().tolist() == [7, 12, 18]


async def test_steps_that_were_applied_are_skipped_in_silence(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "rewind")
    await wire.push(0, floats([1, 2, 3]), first=0)
    await wire.push(0, floats([1, 2, 3]), first=0)
    await wire.push(0, floats([2, 3, 4]), first=1)
    await wire.settle()
    assert (await wire.rows(0, 4)).ravel().tolist() == [1, 3, 6, 10]
    assert not wire.faults[0]


async def test_chunks_behind_a_fault_are_dropped_and_nothing_is_applied_as_another_step(
    served,
) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "pipelined", writer=b"w")
    await wire.push(0, floats([np.nan]), first=0)
    await wire.push(0, floats([20]), first=1)
    await wire.push(0, floats([np.nan]), first=2)
    await wire.push(0, floats([30]), first=3)
    await wire.push(0, floats([40]))
    await wire.settle()
    assert [fault.expected_step for fault in wire.faults.pop(0)] == [0]
    assert (await served.state("accumulator", "pipelined")).step == 0
    # The same step again, bad again: that is another fault.
    await wire.push(0, floats([np.nan]), first=0)
    assert (await wire.next_fault(0)).expected_step == 0
    await wire.push(0, floats([10]), first=0)
    await wire.push(0, floats([20]), first=1)
    assert (await wire.rows(0, 2)).ravel().tolist() == [10, 30]


async def test_a_bad_repeat_of_applied_steps_is_skipped_like_a_good_one(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.push(0, floats([1, 2]), first=0)
    await wire.push(0, floats([np.nan]), first=0)
    await wire.push(0, floats([3]), first=2)
    assert (await wire.rows(0, 3)).ravel().tolist() == [1, 3, 6]
    assert not wire.faults[0]


@pytest.mark.parametrize("first", [2**63 - 1, 2**63, 2**64 - 1])
async def test_an_absurd_first_step_is_a_gap(served, first) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, f"absurd-{first}")
    await wire.push(0, floats([5, 6]), first=first)
    fault = await wire.next_fault(0)
    assert (fault.reason, fault.expected_step) == (Fault.GAP, 0)
    assert (await served.state("accumulator", f"absurd-{first}")).step == 0


async def test_a_fault_in_the_middle_of_a_long_chunk_keeps_what_came_before(sums) -> None:
    served = await sums(run_steps_max=4, run_seconds_max=60)
    wire = served.wire("accumulator")
    await wire.open(0, "prefix")
    await wire.push(0, floats([1] * 9 + [BIG, BIG] + [1] * 9), first=0)
    fault = await wire.next_fault(0)
    # Eight steps ran in two runs; the third run was refused whole.
    assert (fault.reason, fault.expected_step) == (Fault.NON_FINITE, 8)
    assert (await wire.rows(0, 8))[-1] == 8
    await wire.push(0, floats([1]), first=8)
    assert (await wire.rows(0, 1)) == 9


# States that a client brings.


async def test_a_state_of_another_model_or_size_is_refused_and_starts_nothing(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "digest")
    digest = (await served.state("accumulator", "digest")).model_digest
    bad = {
        Fault.WRONG_MODEL: SequenceState(model_digest="beef", step=1, row=bytes(4)),
        Fault.INVALID_INPUT: SequenceState(model_digest=digest, step=1, row=bytes(5)),
    }
    for reason, state in bad.items():
        fault = await wire.refused(1, "brought", state=state)
        assert fault.reason == reason
    for state in (
        SequenceState(model_digest=digest, step=1, row=floats([np.nan]).tobytes()),
        SequenceState(model_digest=digest, step=2**64 - 1, row=bytes(4)),
    ):
        assert (await wire.refused(1, "brought", state=state)).reason == Fault.INVALID_INPUT
    assert "brought" not in await served.list("accumulator")
    await wire.push(0, floats([1]))
    assert (await wire.rows(0, 1)) == 1


# Faults of the calls beside Infer.


async def test_single_questions_name_what_is_not_there(served) -> None:
    for call in (served.state, served.close):
        with pytest.raises(Exception, match="no live sequence 'nobody'") as caught:
            await call("accumulator", "nobody")
        assert caught.value.code() == StatusCode.NOT_FOUND
        with pytest.raises(Exception, match="accumulator, embedding") as caught:
            await call("nonsense", "nobody")
        assert caught.value.code() == StatusCode.NOT_FOUND
    with pytest.raises(Exception, match="nonsense") as caught:
        await served.list("nonsense")
    assert caught.value.code() == StatusCode.NOT_FOUND


async def test_faults_are_counted_by_code_and_reason(sums) -> None:
    served = await sums()
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.push(0, floats([np.nan]))
    await wire.next_fault(0)
    await wire.send(lane=[3], inputs=[Tensor(data=DATA)])
    await wire.next_fault(3)

    def count(code: str, reason: str) -> float:
        return served.metric("sluice_faults_total", model="accumulator", code=code, reason=reason)

    assert count("INVALID_ARGUMENT", "invalid_input") == 1
    assert count("NOT_FOUND", "unknown_lane") == 1
    assert await wire.end() == StatusCode.OK
    assert Closed.CLIENT == 0
