"""The rules of the stream one by one, at the client's core: no sockets."""

import numpy as np
import pytest

from sluice_client import errors
from sluice_client.protocol.calls import Call, LaneRequest
from sluice_client.protocol.connection import Connection
from sluice_client.protocol.openings import Mode, Opening, SequenceState
from sluice_client.protocol.signature import Signature
from sluice_protos.sequences_pb2 import (
    RESUME,
    START,
    TAKEOVER,
    Closed,
    Fault,
    InferRequest,
    InferResponse,
    Limits,
)
from tests.client.model_server import make_contract


@pytest.fixture
def connection() -> Connection:
    connection = Connection("sum", Signature(make_contract()))
    connection.begin(connection.signature)
    return connection


def send(connection: Connection) -> InferRequest:
    request = connection.next_request()
    assert request is not None
    return request


def open_one(connection: Connection, opening: Opening | None = None) -> LaneRequest:
    request = connection.open([opening or Opening("a")])
    send(connection)
    receive(connection, opened=[{"lane": int(request.lanes[0])}])
    return request


def receive(connection: Connection, **fields) -> None:
    connection.receive(InferResponse(**fields))


def give(connection: Connection, request: LaneRequest, *values: int) -> Call:
    rows = np.array([[value, value] for value in values])
    return connection.submit(request.lanes, np.array([len(rows)]), [rows])


def answer(connection: Connection, lane: int, first: int, *values: int) -> None:
    data = np.array([[value, value] for value in values], "<i8").tobytes()
    receive(
        connection,
        lane=[lane],
        steps=[len(values)],
        first_step=[first],
        outputs=[{"data": data}],
    )


def lose(connection: Connection) -> InferRequest:
    """Another stream; what the client first says on it."""
    connection.lose()
    assert connection.next_request() is None
    connection.begin(connection.signature)
    return send(connection)


def test_the_first_message_names_the_model_and_later_ones_do_not(connection) -> None:
    connection.open([Opening("a")])
    assert send(connection).model == "sum"
    connection.open([Opening("b")])
    assert send(connection).model == ""
    assert lose(connection).model == "sum"


def test_the_mode_is_repeated_until_opened_and_is_resume_from_then_on(connection) -> None:
    state = SequenceState("d", 3, np.ones(2, np.float32))
    connection.open([Opening("a", Mode.START, state)])
    first = send(connection).open[0]
    again = lose(connection).open[0]
    for opening in (first, again):
        assert (opening.mode, opening.state.step) == (START, 3)
        assert not opening.HasField("received")
    receive(connection, opened=[{"lane": 0, "applied": 3}])
    resumed = lose(connection).open[0]
    assert (resumed.mode, resumed.received) == (RESUME, 3)
    assert not resumed.HasField("state")
    # One handle, one writer; each open a higher attempt.
    assert first.writer == again.writer == resumed.writer
    assert [first.attempt, again.attempt, resumed.attempt] == [1, 2, 3]


def test_each_handle_draws_its_own_writer() -> None:
    writers = {Opening("a").writer for _ in range(100)}
    assert len(writers) == 100
    assert {len(writer) for writer in writers} == {16}


def test_no_chunk_is_sent_before_opened_and_then_from_what_was_applied(connection) -> None:
    request = open_one(connection)
    call = give(connection, request, 1, 2, 3, 4)
    assert list(send(connection).steps) == [4]
    answer(connection, 0, 0, 1)
    resumed = lose(connection)
    assert not resumed.lane
    assert resumed.open[0].received == 1
    receive(connection, opened=[{"lane": 0, "applied": 3}])
    rest = send(connection)
    assert (list(rest.first_step), rest.inputs[0].data[0]) == ([3], 4)
    answer(connection, 0, 1, 3, 6)
    answer(connection, 0, 3, 10)
    assert call.outputs[0][:, 0].tolist() == [1, 3, 6, 10]


def test_an_output_that_has_arrived_before_is_dropped(connection) -> None:
    request = open_one(connection)
    call = give(connection, request, 1, 2, 3)
    send(connection)
    answer(connection, 0, 0, 1, 3)
    answer(connection, 0, 0, 77)
    answer(connection, 0, 1, 78, 6)
    assert call.is_done
    assert call.outputs[0][:, 0].tolist() == [1, 3, 6]
    assert connection.steps.in_flight == 0


@pytest.mark.parametrize(("first", "count"), [(1, 1), (0, 3)])
def test_an_output_that_leaves_a_gap_or_answers_nothing_ends_its_lane(
    connection, first, count
) -> None:
    request = open_one(connection)
    other = connection.open([Opening("b")])
    send(connection)
    receive(connection, opened=[{"lane": 1}])
    call, beside = give(connection, request, 1, 1), give(connection, other, 1)
    send(connection)
    answer(connection, 0, first, *[1] * count)
    assert isinstance(call.errors[0], errors.ProtocolViolation)
    assert list(send(connection).park) == [0]
    answer(connection, 1, 0, 1)
    assert beside.is_done and not beside.errors


def test_a_server_that_has_gone_back_is_data_loss(connection) -> None:
    request = open_one(connection)
    give(connection, request, 1, 2)
    send(connection)
    answer(connection, 0, 0, 1, 3)
    call = give(connection, request, 3)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "applied": 1}])
    assert isinstance(call.errors[0], errors.DataLoss)
    assert call.errors[0].step == 2


def test_what_comes_from_an_abandoned_stream_is_not_for_the_new_one(connection) -> None:
    request = open_one(connection)
    call = give(connection, request, 1)
    send(connection)
    lose(connection)
    answer(connection, 0, 0, 99)  # not attached on this stream
    assert not call.is_done


def test_a_conflict_is_asked_again_with_its_epoch(connection) -> None:
    request = connection.open([Opening("a", Mode.TAKEOVER)])
    assert send(connection).open[0].expected_epoch == 0
    receive(connection, faults=[{"lane": 0, "reason": Fault.CONFLICT, "epoch": 7}])
    again = send(connection).open[0]
    assert (again.mode, again.expected_epoch, again.attempt) == (TAKEOVER, 7, 2)
    receive(connection, opened=[{"lane": 0, "applied": 5}])
    assert request.is_done and not request.errors
    assert connection.steps.received(0) == 5


def test_the_same_conflict_twice_is_an_error_not_a_loop(connection) -> None:
    request = connection.open([Opening("a")])
    for _ in range(2):
        send(connection)
        receive(connection, faults=[{"lane": 0, "reason": Fault.CONFLICT, "epoch": 7}])
    assert isinstance(request.errors[0], errors.ProtocolViolation)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Fault.ALREADY_EXISTS, errors.SequenceExists),
        (Fault.NOT_FOUND, errors.SequenceNotFound),
        (Fault.SEQUENCE_CLOSED, errors.SequenceClosed),
        (Fault.FENCED, errors.Fenced),
        (Fault.LIMIT, errors.LimitReached),
        (Fault.OUT_OF_RANGE, errors.DataLoss),
        (Fault.WRONG_MODEL, errors.WrongModel),
    ],
)
def test_a_refused_open_is_an_exception_of_its_own(connection, reason, kind) -> None:
    request = connection.open([Opening("a")])
    send(connection)
    receive(connection, faults=[{"lane": 0, "reason": reason, "message": "mend it"}])
    error = request.errors[0]
    assert type(error) is kind
    assert (error.sequence_id, error.reason) == ("a", Fault.Reason.Name(reason))
    assert "mend it" in str(error)


@pytest.mark.parametrize("reason", [Closed.FENCED, Closed.DRAINING])
def test_a_fenced_or_drained_lane_asks_to_resume_before_it_gives_up(connection, reason) -> None:
    request = open_one(connection)
    call = give(connection, request, 1)
    send(connection)
    receive(connection, closed=[{"lane": 0, "reason": reason}])
    assert not call.is_done
    if reason == Closed.DRAINING:
        # Not at the server that stops: on the next stream.
        assert connection.next_request() is None
        assert connection.is_spent
        opening = lose(connection).open[0]
    else:
        opening = send(connection).open[0]
    assert opening.mode == RESUME
    receive(connection, faults=[{"lane": 0, "reason": Fault.FENCED, "message": "taken"}])
    assert isinstance(call.errors[0], errors.Fenced)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [(Closed.CLIENT, errors.SequenceClosed), (Closed.IDLE, errors.SequenceExpired)],
)
def test_a_sequence_that_has_ended_says_so_at_its_next_step(connection, reason, kind) -> None:
    request = open_one(connection)
    receive(connection, closed=[{"lane": 0, "reason": reason}])
    call = give(connection, request, 1)
    assert connection.next_request() is None
    assert type(call.errors[0]) is kind


@pytest.mark.parametrize("reason", [Fault.SEQUENCE_CLOSED, Fault.NOT_FOUND, Fault.FENCED])
def test_a_close_that_was_done_already_has_succeeded(connection, reason) -> None:
    request = open_one(connection)
    ended = connection.close(request.lanes)
    assert list(send(connection).close) == [0]
    lose(connection)
    receive(connection, faults=[{"lane": 0, "reason": reason}])
    assert ended.is_done and not ended.errors


def test_a_close_waits_for_all_outputs(connection) -> None:
    request = open_one(connection)
    call = give(connection, request, 1)
    connection.close(request.lanes)
    assert not send(connection).close
    answer(connection, 0, 0, 1)
    assert call.is_done
    assert list(send(connection).close) == [0]


def test_a_lane_number_is_used_again_only_after_its_closed(connection) -> None:
    request = open_one(connection)
    connection.close(request.lanes)
    send(connection)
    assert connection.open([Opening("b")]).lanes.tolist() == [1]
    receive(connection, closed=[{"lane": 0, "reason": Closed.CLIENT}])
    assert connection.open([Opening("c")]).lanes.tolist() == [0]


def test_acknowledgements_ride_along_and_go_alone_when_they_are_due(connection) -> None:
    receive(connection, limits=Limits(credit_steps=100, unacknowledged_steps_max=4))
    request = open_one(connection)
    give(connection, request, 1)
    send(connection)
    answer(connection, 0, 0, 1)
    assert connection.next_request() is None
    give(connection, request, *[1] * 20)
    assert send(connection).received_responses == 3
    answer(connection, 0, 1, 1)
    assert connection.next_request() is None
    answer(connection, 0, 2, 1)
    alone = send(connection)
    assert alone.received_responses == 5
    assert not alone.lane


def test_a_chunk_that_nobody_knows_any_more_does_not_end_a_lane_that_is_opening(
    connection,
) -> None:
    request = connection.open([Opening("a")])
    send(connection)
    receive(connection, faults=[{"lane": 0, "reason": Fault.UNKNOWN_LANE}])
    receive(connection, opened=[{"lane": 0}])
    assert request.is_done and not request.errors


def test_another_model_of_the_same_name_ends_the_sequences_of_the_old_one(connection) -> None:
    request = open_one(connection)
    connection.lose()
    contract = make_contract()
    contract.outputs[0].shape[0] = 3
    connection.begin(Signature(contract))
    call = give(connection, request, 1)
    connection.next_request()
    assert isinstance(call.errors[0], errors.WrongModel)


def test_a_new_version_of_the_model_is_asked_whether_the_old_one_is_still_there(
    connection,
) -> None:
    open_one(connection)
    connection.lose()
    contract = make_contract()
    contract.digest = "other"
    connection.begin(Signature(contract))
    assert send(connection).open[0].mode == RESUME


def test_a_fault_fails_its_step_and_discards_what_was_given_behind_it(connection) -> None:
    request = open_one(connection)
    before, bad, behind = (give(connection, request, *values) for values in ([1], [2, 3], [4]))
    send(connection)
    answer(connection, 0, 0, 1)
    answer(connection, 0, 1, 3)
    fault = {"lane": 0, "reason": Fault.NON_FINITE, "expected_step": 2, "message": "mend it"}
    receive(connection, faults=[fault])
    assert before.is_done and not before.errors
    assert type(bad.errors[0]) is errors.NonFinite
    assert type(behind.errors[0]) is errors.StepDiscarded
    assert (bad.errors[0].step, behind.errors[0].step) == (2, 3)
    assert connection.steps.in_flight == 0
    again = give(connection, request, 5)
    assert list(send(connection).first_step) == [2]
    answer(connection, 0, 2, 8)
    assert again.outputs[0][0, 0] == 8


def test_a_fault_of_another_step_than_the_next_is_a_violation(connection) -> None:
    request = open_one(connection)
    call = give(connection, request, 1, 2)
    send(connection)
    receive(connection, faults=[{"lane": 0, "reason": Fault.INVALID_INPUT, "expected_step": 1}])
    assert isinstance(call.errors[0], errors.ProtocolViolation)


def test_no_message_is_larger_than_the_server_takes(connection) -> None:
    receive(connection, limits=Limits(request_bytes_max=8192, credit_steps=10_000))
    request = open_one(connection)
    give(connection, request, *[1] * 1000)
    sizes = []
    while (message := connection.next_request()) is not None:
        sizes.append(message.ByteSize())
    assert max(sizes) <= 8192
    assert len(sizes) > 1
    assert connection.steps.in_flight == 1000


def test_a_step_that_no_message_can_hold_is_refused_before_it_is_sent(connection) -> None:
    receive(connection, limits=Limits(request_bytes_max=4100))
    request = open_one(connection)
    with pytest.raises(errors.LimitReached, match="16 bytes"):
        give(connection, request, 1)


def test_a_message_full_of_steps_has_no_room_for_thousands_of_closes(connection) -> None:
    receive(connection, limits=Limits(request_bytes_max=16_384, credit_steps=100_000))
    lane = int(open_one(connection).lanes[0])
    crowd = connection.open([Opening(str(number)) for number in range(20_000)])
    while connection.next_request() is not None:
        pass
    receive(connection, opened=[{"lane": number} for number in crowd.lanes.tolist()])
    connection.submit(np.array([lane]), np.array([1000]), [np.ones((1000, 2), np.int64)])
    closing = connection.close(crowd.lanes)
    sizes, closed = [], []
    while (message := connection.next_request()) is not None:
        sizes.append(message.ByteSize())
        closed += message.close
    assert max(sizes) <= 16_384
    assert sorted(closed) == sorted(closing.lanes.tolist())
    assert connection.steps.in_flight == 1000


def state_of(size: int) -> SequenceState:
    return SequenceState("d", 3, np.ones(size // 4, np.float32))


def test_an_open_that_no_message_can_hold_is_refused_alone(connection) -> None:
    receive(connection, limits=Limits(request_bytes_max=16_384, credit_steps=1000))
    request = open_one(connection)
    huge = connection.open([Opening("huge", state=state_of(16_384))])
    beside = connection.open([Opening("beside")])
    assert [opening.sequence_id for opening in send(connection).open] == ["beside"]
    error = huge.errors[0]
    assert isinstance(error, errors.LimitReached)
    assert error.sequence_id == "huge"
    assert "--request-bytes-max" in str(error)
    assert not beside.is_done
    give(connection, request, 1)
    assert list(send(connection).lane) == [0]


def test_a_large_open_leaves_a_large_step_to_the_next_message() -> None:
    contract = make_contract()
    contract.inputs[0].shape[0] = 1000  # 8,000 bytes a step
    connection = Connection("sum", Signature(contract))
    connection.begin(connection.signature)
    receive(connection, limits=Limits(request_bytes_max=16_384, credit_steps=1000))
    request = open_one(connection)
    connection.open([Opening("large", state=state_of(12_000))])
    connection.submit(request.lanes, np.array([1]), [np.ones((1, 1000), np.int64)])
    messages = [send(connection), send(connection)]
    assert [len(message.open) for message in messages] == [1, 0]
    assert [len(message.lane) for message in messages] == [0, 1]
    assert max(message.ByteSize() for message in messages) <= 16_384


def test_a_large_open_leaves_thousands_of_closes_to_the_next_messages(connection) -> None:
    receive(connection, limits=Limits(request_bytes_max=16_384, credit_steps=1000))
    crowd = connection.open([Opening(str(number)) for number in range(2_000)])
    while connection.next_request() is not None:
        pass
    receive(connection, opened=[{"lane": number} for number in crowd.lanes.tolist()])
    connection.close(crowd.lanes)
    connection.open([Opening("large", state=state_of(15_000))])
    sizes, closed = [], []
    while (message := connection.next_request()) is not None:
        sizes.append(message.ByteSize())
        closed += message.close
    assert max(sizes) <= 16_384
    assert len(closed) == 2_000
