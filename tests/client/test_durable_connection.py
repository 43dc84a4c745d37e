"""The rules for sequences that outlive their server, one by one, at the core: no sockets."""

import numpy as np
import pytest

from sluice_client import errors
from sluice_client.protocol.calls import Call, LaneRequest
from sluice_client.protocol.connection import Connection
from sluice_client.protocol.openings import Mode, Opening, SequenceState, ticket_opening
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Signature
from sluice_client.protocol.tickets import Ticket
from sluice_protos.sequences_pb2 import (
    OFF,
    PERIODIC,
    RESTART,
    RESUME,
    STRICT,
    Closed,
    Fault,
    InferRequest,
    InferResponse,
    Limits,
)
from tests.client.model_server import make_contract

TICKET = Ticket("sum", "a", b"writer", attempt=7, received=3, durable=2)


def connect(**bounds: int) -> Connection:
    connection = Connection("sum", Signature(make_contract()), bounds=Bounds(**bounds))
    connection.begin(connection.signature)
    return connection


@pytest.fixture
def connection() -> Connection:
    return connect()


def send(connection: Connection) -> InferRequest:
    request = connection.next_request()
    assert request is not None
    return request


def receive(connection: Connection, **fields) -> None:
    connection.receive(InferResponse(**fields))


def open_one(connection: Connection, opening: Opening | None = None, **opened) -> LaneRequest:
    request = connection.open([opening or Opening("a")])
    send(connection)
    fields = {"durability": PERIODIC, **opened}
    receive(connection, opened=[{"lane": int(request.lanes[0]), **fields}])
    return request


def give(connection: Connection, request: LaneRequest, *values: int) -> Call:
    rows = np.array([[value, value] for value in values])
    return connection.submit(request.lanes, np.array([len(rows)]), [rows])


def answer(connection: Connection, first: int, *values: int, lane: int = 0) -> None:
    data = np.array([[value, value] for value in values], "<i8").tobytes()
    receive(
        connection,
        lane=[lane],
        steps=[len(values)],
        first_step=[first],
        outputs=[{"data": data}],
    )


def sent(message: InferRequest | None) -> list[tuple[int, int]]:
    """(step, value) of each step in a message for one lane."""
    if message is None or not message.lane:
        return []
    rows = np.frombuffer(message.inputs[0].data, "<i8").reshape(-1, 2)[:, 0].tolist()
    counts = list(message.steps) or [1] * len(message.lane)
    steps = [
        first + k
        for first, count in zip(message.first_step, counts, strict=True)
        for k in range(count)
    ]
    return list(zip(steps, rows, strict=True))


def lose(connection: Connection) -> InferRequest:
    """Another stream; what the client first says on it."""
    connection.lose()
    connection.begin(connection.signature)
    return send(connection)


def durable(connection: Connection, step: int, lane: int = 0) -> None:
    receive(connection, durable=[{"lane": lane, "step": step}])


# -- replay: inputs are retained until they are durable, and sent again; known outputs are dropped


def test_a_server_that_has_gone_back_is_sent_again_what_it_lacks(connection) -> None:
    request = open_one(connection)
    first, second = give(connection, request, 1, 2), give(connection, request, 3)
    send(connection)
    answer(connection, 0, 1, 3, 6)
    durable(connection, 1)
    assert lose(connection).open[0].received == 3
    receive(connection, opened=[{"lane": 0, "applied": 1, "durable": 1, "durability": PERIODIC}])
    third = give(connection, request, 4)
    assert sent(send(connection)) == [(1, 2), (2, 3), (3, 4)]
    answer(connection, 1, 77, 77, 10)  # the first two are known, and are dropped
    assert first.outputs[0][:, 0].tolist() == [1, 3]
    assert second.outputs[0][:, 0].tolist() == [6]
    assert third.outputs[0][:, 0].tolist() == [10]
    assert connection.steps.in_flight == 0


def test_what_is_durable_is_released_and_the_rest_is_retained(connection) -> None:
    request = open_one(connection)
    for value in range(10):
        give(connection, request, value)
    send(connection)
    answer(connection, 0, *[0] * 10)
    whole = connection.steps.replay_buffer.bytes(16)
    durable(connection, 7)
    assert 0 < connection.steps.replay_buffer.bytes(16) < whole
    durable(connection, 10)
    assert connection.steps.replay_buffer.bytes(16) == 0
    # Nor is anything left of what is durable before its output comes.
    give(connection, request, 1)
    send(connection)
    durable(connection, 11)
    answer(connection, 10, 0)
    assert connection.steps.replay_buffer.bytes(16) == 0


@pytest.mark.parametrize("given", [OFF, STRICT])
def test_without_checkpoints_behind_its_back_a_client_retains_nothing(connection, given) -> None:
    request = open_one(connection, durability=given)
    give(connection, request, 1, 2, 3)
    send(connection)
    answer(connection, 0, 1, 3)
    assert connection.steps.replay_buffer.bytes(16) == 0
    assert connection.lanes[0].durability == {OFF: "off", STRICT: "strict"}[given]
    assert connection.durable(np.array([0])).tolist() == [{OFF: 0, STRICT: 2}[given]]


def test_a_chunk_whose_end_was_refused_is_sent_again_without_it(connection) -> None:
    request = open_one(connection)
    call = give(connection, request, 1, 2, 3)
    send(connection)
    answer(connection, 0, 1, 3)
    receive(connection, faults=[{"lane": 0, "reason": Fault.NON_FINITE, "expected_step": 2}])
    assert isinstance(call.errors[0], errors.NonFinite)
    give(connection, request, 4)
    send(connection)
    answer(connection, 2, 7)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "durability": PERIODIC}])
    assert sent(send(connection)) == [(0, 1), (1, 2), (2, 4)]


def test_a_replay_may_be_lost_as_well(connection) -> None:
    request = open_one(connection)
    give(connection, request, 1, 2, 3, 4)
    send(connection)
    answer(connection, 0, 1, 3, 6, 10)
    for applied in (0, 2, 1):
        lose(connection)
        receive(connection, opened=[{"lane": 0, "applied": applied, "durability": PERIODIC}])
        assert sent(send(connection))[0] == (applied, applied + 1)
        answer(connection, applied, 77)
    assert connection.steps.in_flight == 2


def test_a_server_may_turn_strict_while_it_is_behind(connection) -> None:
    request = open_one(connection)
    give(connection, request, 1, 2, 3)
    send(connection)
    answer(connection, 0, 1, 3, 6)
    for _ in range(2):
        lose(connection)
        receive(connection, opened=[{"lane": 0, "durability": STRICT}])
        assert sent(send(connection)) == [(0, 1), (1, 2), (2, 3)]
        answer(connection, 0, 1, 3)
    answer(connection, 2, 6)
    assert connection.steps.replay_buffer.bytes(16) == 0


def test_outputs_that_come_again_are_acknowledged_again() -> None:
    connection = connect()
    receive(connection, limits=Limits(credit_steps=100, unacknowledged_steps_max=4))
    request = open_one(connection)
    give(connection, request, *range(8))
    send(connection)
    answer(connection, 0, *[0] * 8)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "durability": PERIODIC}])
    assert len(sent(send(connection))) == 8
    answer(connection, 0, 0, 0)
    # The server holds them, and would stop running at four.
    assert send(connection).received_responses == 2


# -- the bounds of the replay buffer


def test_a_sequence_that_retains_too_many_steps_waits_until_they_are_durable() -> None:
    connection = connect(steps_max=3)
    request, other = open_one(connection), open_one(connection, Opening("b"), lane=1)
    call = give(connection, request, 1, 2, 3, 4, 5)
    assert sent(send(connection)) == [(0, 1), (1, 2), (2, 3)]
    answer(connection, 0, 1, 3, 6)
    assert connection.next_request() is None
    assert not connection.has_something_to_send
    give(connection, other, 9)  # another sequence is not held up
    assert list(send(connection).lane) == [1]
    durable(connection, 1)
    assert sent(send(connection)) == [(3, 4)]
    durable(connection, 4)
    assert sent(send(connection)) == [(4, 5)]
    answer(connection, 3, 10, 15)
    assert call.is_done


def test_sequences_that_retain_too_many_bytes_wait_until_one_is_durable() -> None:
    connection = connect(bytes_max=600)
    one, two = open_one(connection), open_one(connection, Opening("b"), lane=1)
    three = open_one(connection, Opening("c"), lane=2, durability=STRICT)
    for lane, request in enumerate((one, two)):
        give(connection, request, 1)
        send(connection)
        answer(connection, 0, 1, lane=lane)
    for request in (one, two, three):
        give(connection, request, 1)
    assert list(send(connection).lane) == [2]  # a lane that retains nothing may send
    durable(connection, 1, lane=1)
    assert sorted(send(connection).lane) == [0, 1]


def test_what_is_retained_is_sent_again_however_much_it_is() -> None:
    connection = connect(steps_max=4, bytes_max=1)
    request = open_one(connection)
    for value in range(3):
        give(connection, request, value)
        if sent(connection.next_request()):
            answer(connection, value, 0)
        durable(connection, 0)
    retained = connection.steps.received(0)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "durability": PERIODIC}])
    assert sent(connection.next_request()) == [(step, step) for step in range(retained)]


@pytest.mark.parametrize("bounds", [{"steps_max": 0}, {"bytes_max": 0}])
def test_a_bound_of_nothing_is_refused(bounds) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Bounds(**bounds)


# -- data loss: a server behind what was durable, and other losses


def test_a_server_behind_what_was_durable_has_lost_data(connection) -> None:
    request = open_one(connection)
    give(connection, request, 1, 2, 3)
    send(connection)
    answer(connection, 0, 1, 3, 6)
    durable(connection, 2)
    call = give(connection, request, 4)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "applied": 1, "durability": PERIODIC}])
    assert isinstance(call.errors[0], errors.DataLoss)
    assert "back to step 1, but 2 steps were durable" in str(call.errors[0])
    assert call.errors[0].step == 3
    assert list(send(connection).park) == [0]


def test_a_strict_server_behind_what_has_arrived_has_lost_data(connection) -> None:
    request = open_one(connection, durability=STRICT)
    give(connection, request, 1, 2)
    send(connection)
    answer(connection, 0, 1, 3)
    call = give(connection, request, 3)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "applied": 1, "durability": STRICT}])
    assert isinstance(call.errors[0], errors.DataLoss)


def test_steps_that_were_never_sent_cannot_be_durable(connection) -> None:
    request = open_one(connection)
    call = give(connection, request, 1)
    send(connection)
    durable(connection, 2)
    assert isinstance(call.errors[0], errors.ProtocolViolation)


def test_a_record_that_cannot_be_read_is_data_loss(connection) -> None:
    request = connection.open([Opening("a", Mode.START_OR_RESUME)])
    send(connection)
    fault = {"lane": 0, "reason": Fault.DATA_LOSS, "message": "it fails its checksum"}
    receive(connection, faults=[fault])
    assert isinstance(request.errors[0], errors.DataLoss)
    assert "checksum" in str(request.errors[0])


def test_what_was_applied_once_and_is_refused_now_ends_the_sequence(connection) -> None:
    request = open_one(connection)
    give(connection, request, 1, 2)
    send(connection)
    answer(connection, 0, 1, 3)
    call = give(connection, request, 3)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "durability": PERIODIC}])
    send(connection)
    receive(connection, faults=[{"lane": 0, "reason": Fault.RUN_FAILED, "expected_step": 0}])
    assert isinstance(call.errors[0], errors.DataLoss)


# -- ends, while the server may go back


def test_a_park_waits_until_the_server_has_caught_up(connection) -> None:
    request = open_one(connection)
    give(connection, request, 1, 2)
    send(connection)
    answer(connection, 0, 1, 3)
    parked = connection.park(request.lanes)
    assert list(send(connection).park) == [0]
    assert lose(connection).open[0].mode == RESUME  # the park may not have been stored
    assert not parked.is_done
    receive(connection, opened=[{"lane": 0, "applied": 1, "durability": PERIODIC}])
    again = send(connection)
    assert (sent(again), list(again.park)) == ([(1, 2)], [])
    answer(connection, 1, 3)
    assert list(send(connection).park) == [0]
    receive(connection, closed=[{"lane": 0, "reason": Closed.PARKED}])
    assert parked.is_done and not parked.errors


def test_a_park_of_what_is_durable_needs_no_answer(connection) -> None:
    request = open_one(connection)
    give(connection, request, 1)
    send(connection)
    answer(connection, 0, 1)
    durable(connection, 1)
    parked = connection.park(request.lanes)
    send(connection)
    connection.lose()
    assert parked.is_done and not parked.errors


def test_an_idle_lane_has_its_answers_and_a_server_that_stands_there(connection) -> None:
    request = open_one(connection)
    assert connection.lanes.when_idle(request.lanes).is_done
    give(connection, request, 1)
    idle = connection.lanes.when_idle(request.lanes)
    send(connection)
    assert not idle.is_done
    answer(connection, 0, 1)
    assert idle.is_done
    lose(connection)
    idle = connection.lanes.when_idle(request.lanes)
    receive(connection, opened=[{"lane": 0, "durability": PERIODIC}])
    send(connection)
    assert not idle.is_done
    answer(connection, 0, 1)
    assert idle.is_done
    idle = connection.lanes.when_idle(request.lanes)
    connection.fail(errors.Unavailable("gone"))
    assert not idle.errors
    lost = connection.lanes.when_idle(request.lanes)
    assert isinstance(lost.errors[0], errors.Unavailable)


# -- the store does not answer


def test_an_open_that_the_store_does_not_answer_is_asked_again(connection) -> None:
    state = SequenceState("d", 3, np.ones(2, np.float32))
    request = connection.open([Opening("a", Mode.RESTART, state)])
    send(connection)
    receive(connection, faults=[{"lane": 0, "reason": Fault.UNAVAILABLE, "message": "down"}])
    assert not request.is_done
    assert connection.next_request() is None
    # Nothing else is on this stream: another server may do better.
    assert connection.is_spent
    assert connection.lanes.refusal == "down"
    again = lose(connection).open[0]
    assert (again.mode, again.attempt, again.state.step) == (RESTART, 2, 3)


def test_what_waits_for_the_store_leaves_the_rest_of_the_stream_alone(connection) -> None:
    served = open_one(connection)
    strict = open_one(connection, Opening("b"), lane=1, durability=STRICT)
    call = give(connection, strict, 1)
    send(connection)
    receive(connection, faults=[{"lane": 1, "reason": Fault.UNAVAILABLE, "message": "down"}])
    assert connection.lanes.postponed
    assert not connection.is_spent
    assert connection.next_request() is None
    give(connection, served, 5)
    assert list(send(connection).lane) == [0]
    connection.lanes.retry_postponed()
    (opening,) = send(connection).open
    assert (opening.lane, opening.mode, opening.attempt) == (1, RESUME, 2)
    receive(connection, opened=[{"lane": 1, "durability": STRICT}])
    assert connection.lanes.has_recovered
    assert sent(send(connection)) == [(0, 1)]
    answer(connection, 0, 1, lane=1)
    assert call.is_done and not call.errors


def test_who_has_waited_for_the_store_too_long_is_told_and_nobody_else(connection) -> None:
    served = open_one(connection)
    waiting = connection.open([Opening("b")])
    send(connection)
    receive(connection, faults=[{"lane": 1, "reason": Fault.UNAVAILABLE}])
    connection.lanes.fail_postponed(errors.Unavailable("the store is down"))
    assert isinstance(waiting.errors[0], errors.Unavailable)
    assert waiting.errors[0].sequence_id == "b"
    call = give(connection, served, 1)
    send(connection)
    answer(connection, 0, 1)
    assert call.is_done and not call.errors


def test_a_close_that_the_store_does_not_answer_is_asked_again(connection) -> None:
    request = open_one(connection)
    closed = connection.close(request.lanes)
    assert list(send(connection).close) == [0]
    receive(connection, faults=[{"lane": 0, "reason": Fault.UNAVAILABLE}])
    assert not closed.is_done
    connection.lanes.retry_postponed()
    assert send(connection).open[0].mode == RESUME
    receive(connection, opened=[{"lane": 0, "durability": PERIODIC}])
    assert list(send(connection).close) == [0]
    receive(connection, closed=[{"lane": 0, "reason": Closed.CLIENT}])
    assert closed.is_done and not closed.errors


def test_a_server_that_drains_is_left_for_another_one(connection) -> None:
    connection.open([Opening("a")])
    send(connection)
    fault = {"lane": 0, "reason": Fault.DRAINING, "code": 14, "message": "it stops"}
    receive(connection, faults=[fault])
    assert connection.is_spent
    assert not connection.lanes.has_opened
    assert connection.lanes.refusal == "it stops"


# -- durability


@pytest.mark.parametrize(
    ("asked", "wire"), [(None, 0), ("off", OFF), ("periodic", PERIODIC), ("strict", STRICT)]
)
def test_every_open_asks_for_its_durability(connection, asked, wire) -> None:
    open_one(connection, Opening("a", durability=asked))
    assert lose(connection).open[0].durability == wire


def test_a_durability_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="off, periodic, strict or None"):
        Opening("a", durability="forever")  # pyright: ignore


# -- a ticket


def test_a_ticket_resumes_with_its_writer_and_a_higher_attempt(connection) -> None:
    renewed = TICKET.renew(received=5)
    connection.open([ticket_opening(renewed)])
    opening = send(connection).open[0]
    assert (opening.mode, opening.writer, opening.received) == (RESUME, b"writer", 5)
    assert opening.attempt > TICKET.attempt
    # Above all that the ticket's handle can have sent, in whatever process, before now.
    later = TICKET.renew()
    assert later.attempt > opening.attempt
    # And should the clock have gone back, above the ticket's all the same.
    future = Ticket("sum", "a", b"writer", attempt=2**60, received=3)
    assert future.renew().attempt > 2**60


def test_a_ticket_is_a_line_of_text_and_back() -> None:
    ticket = Ticket("m", "ä", bytes(range(16)), 5, 6, 7, "strict", holds_outputs=True)
    assert "\n" not in ticket.to_json()
    assert Ticket.from_json(ticket.to_json()) == ticket


def test_outputs_nobody_has_taken_come_to_the_handle_that_goes_on(connection) -> None:
    request = open_one(connection, ticket_opening(TICKET), applied=5, durable=5)
    inherited = connection.lanes[0].inherited
    assert inherited is not None
    answer(connection, 3, 10, 15)
    assert inherited.is_done
    assert inherited.outputs[0][:, 0].tolist() == [10, 15]
    call = give(connection, request, 6)
    assert sent(send(connection)) == [(5, 6)]
    answer(connection, 5, 21)
    assert call.outputs[0][0, 0] == 21


def test_inputs_another_handle_was_given_are_asked_for(connection) -> None:
    request = open_one(connection, ticket_opening(TICKET), applied=2, durable=2)
    assert connection.lanes[0].replays_from == 2
    assert connection.next_request() is None
    with pytest.raises(errors.InvalidInput, match="1 steps must be replayed, not 2"):
        connection.replay(0, [np.ones((2, 2), np.int64)])
    connection.replay(0, [np.full((1, 2), 3)])
    assert connection.lanes[0].replays_from is None
    with pytest.raises(errors.InvalidInput, match="no steps must be replayed, not 1"):
        connection.replay(0, [np.full((1, 2), 3)])
    call = give(connection, request, 4)
    assert sent(send(connection)) == [(2, 3), (3, 4)]
    answer(connection, 2, 6)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "applied": 2, "durability": PERIODIC}])
    assert sent(send(connection)) == [(2, 3), (3, 4)]
    answer(connection, 2, 6, 10)
    assert call.outputs[0][0, 0] == 10


def test_inputs_are_asked_for_anew_when_the_stream_is_lost_meanwhile(connection) -> None:
    open_one(connection, ticket_opening(TICKET), applied=2, durable=2)
    assert lose(connection).open[0].received == 3
    receive(connection, opened=[{"lane": 0, "applied": 3, "durability": PERIODIC}])
    assert connection.lanes[0].replays_from is None


def test_a_server_that_goes_back_behind_a_tickets_inputs_needs_a_replay(connection) -> None:
    request = open_one(connection, ticket_opening(TICKET), applied=3, durable=2)
    call = give(connection, request, 4)
    send(connection)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "applied": 2, "durability": PERIODIC}])
    assert isinstance(call.errors[0], errors.ReplayNeeded)
    assert "resume again" in str(call.errors[0])


def test_inputs_that_were_never_known_are_asked_for_not_made_up(connection) -> None:
    open_one(connection, ticket_opening(TICKET), applied=5, durable=2)
    answer(connection, 3, 10, 15)
    lose(connection)
    receive(connection, opened=[{"lane": 0, "applied": 4, "durability": PERIODIC}])
    assert connection.lanes[0].replays_from == 4
    assert connection.next_request() is None
    connection.replay(0, [np.full((1, 2), 5)])
    assert sent(send(connection)) == [(4, 5)]


def test_a_ticket_knows_what_was_durable(connection) -> None:
    request = connection.open([ticket_opening(TICKET)])
    send(connection)
    receive(connection, opened=[{"lane": 0, "applied": 1, "durability": PERIODIC}])
    assert isinstance(request.errors[0], errors.DataLoss)


def test_a_handle_whose_ticket_another_has_used_is_fenced(connection) -> None:
    request = open_one(connection)
    call = give(connection, request, 1)
    send(connection)
    receive(connection, closed=[{"lane": 0, "reason": Closed.FENCED}])
    assert send(connection).open[0].attempt == 2
    receive(connection, faults=[{"lane": 0, "reason": Fault.STALE, "message": "a later one"}])
    assert isinstance(call.errors[0], errors.Fenced)


# -- outputs that are held until they are confirmed


def test_held_outputs_are_acknowledged_when_they_are_confirmed() -> None:
    connection = connect()
    receive(connection, limits=Limits(credit_steps=100, unacknowledged_steps_max=6))
    request = open_one(connection, Opening("a", holds_outputs=True))
    other = open_one(connection, Opening("b"), lane=1)
    give(connection, request, 1, 2, 3, 4)
    give(connection, request, 5, 6, 7)
    give(connection, other, 1)
    send(connection)
    answer(connection, 0, 1, 3, 6, 10)
    answer(connection, 0, 1, lane=1)
    # Only the other's, and lane by lane: a number of responses would say it of all.
    give(connection, other, 1)
    message = send(connection)
    assert not message.received_responses
    assert [(entry.lane, entry.step) for entry in message.received] == [(1, 1)]
    connection.confirm(0, 2)
    # The server would soon stop for want of it.
    assert [(entry.lane, entry.step) for entry in send(connection).received] == [(0, 2)]
    connection.confirm(0, 99)  # more than has arrived
    assert lose(connection).open[0].received == 4


def test_a_chunk_that_could_never_be_confirmed_is_refused() -> None:
    connection = connect()
    receive(connection, limits=Limits(credit_steps=100, unacknowledged_steps_max=3))
    request = open_one(connection, Opening("a", holds_outputs=True))
    give(connection, request, 1, 2, 3)
    with pytest.raises(errors.LimitReached, match="send smaller chunks"):
        give(connection, request, 1, 2, 3, 4)
    other = open_one(connection, Opening("b"), lane=1)
    give(connection, other, 1, 2, 3, 4)


def test_a_resume_tells_only_what_was_confirmed(connection) -> None:
    request = open_one(connection, Opening("a", holds_outputs=True))
    call = give(connection, request, 1, 2, 3)
    send(connection)
    answer(connection, 0, 1, 3)
    connection.confirm(0, 1)
    assert lose(connection).open[0].received == 1
    receive(connection, opened=[{"lane": 0, "applied": 2, "durability": PERIODIC}])
    assert sent(send(connection)) == [(2, 3)]
    answer(connection, 1, 77)  # held, and known here
    answer(connection, 2, 6)
    assert call.outputs[0][:, 0].tolist() == [1, 3, 6]
    assert connection.steps.in_flight == 0


def test_a_rollback_is_a_restart_from_a_state(connection) -> None:
    state = SequenceState("d", 3, np.ones(2, np.float32))
    connection.open([Opening("a", Mode.RESTART, state)])
    opening = send(connection).open[0]
    assert (opening.mode, opening.state.step) == (RESTART, 3)
