"""What one caller gives wrongly is its own error: the sequences beside it go on."""

from dataclasses import replace

import numpy as np
import pytest

from sluice_client import AsyncClient, Client, Mode, SequenceState, SluiceError, Ticket
from sluice_client.protocol.openings import Opening, ticket_opening
from tests.client.recording_server import RecordingServer

ROW = np.ones(2, np.float32)
TICKET = Ticket("sum", "a", b"writer", attempt=7, received=3)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Opening(7), TypeError, "sequence_id is text, not 7"),
        (lambda: Opening("\ud800"), ValueError, "sequence_id has half of a surrogate pair"),
        (lambda: Opening("a", "TAKEOVER"), TypeError, "mode is a Mode, such as Mode.TAKEOVER"),
        (lambda: Opening("a", state=ROW), TypeError, "state is a SequenceState"),
        (lambda: Opening("a", holds_outputs="no"), TypeError, "True or False"),
        (lambda: SequenceState(None, 1, ROW), TypeError, "model_digest is text"),
        (lambda: SequenceState("d", -1, ROW), ValueError, "step is from 0 to"),
        (lambda: SequenceState("d", 2**63, ROW), ValueError, "step is from 0 to"),
        (lambda: SequenceState("d", 1.0, ROW), TypeError, "step is a whole number"),
        (lambda: SequenceState("d", 1, [1.0, 1.0]), TypeError, "row is an array of float32"),
        (lambda: SequenceState("d", 1, np.array("a")), TypeError, "row is an array of float32"),
        (lambda: TICKET.renew(-1), ValueError, "received is from 0 to"),
        (lambda: replace(TICKET, sequence_id=7), TypeError, "sequence_id is text"),
        (lambda: replace(TICKET, writer="writer"), TypeError, "writer is bytes"),
        (lambda: replace(TICKET, attempt="7"), TypeError, "attempt is a whole number"),
        (lambda: replace(TICKET, durable=None), TypeError, "durable is a whole number"),
    ],
)
def test_what_no_message_can_hold_is_refused_at_once(make, kind, message) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_what_a_message_can_hold_is_not_refused() -> None:
    Opening("ä\0", Mode.RESTART, SequenceState("", np.int64(3), ROW.astype(np.float64)))
    ticket_opening(TICKET.renew(np.int32(4)))


async def test_a_stream_of_nothing_ahead_is_refused(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client, client.sequence("sum") as sequence:
        with pytest.raises(ValueError, match="ahead is from 1 to"):
            _ = [y async for y in sequence.stream([[1, 1]], ahead=0)]
        assert (await sequence.step([2, 3])).tolist() == [2, 3]


def test_a_stream_of_threads_with_nothing_ahead_is_refused(recorder: RecordingServer) -> None:
    with Client(recorder.address) as client, client.sequence("sum") as sequence:
        with pytest.raises(ValueError, match="ahead is from 1 to"):
            list(sequence.stream([[1, 1]], ahead=0))
        assert sequence.step([2, 3]).tolist() == [2, 3]


def spoiled_state() -> SequenceState:
    """Stands for any defect of the client that shows when a message is put together."""
    state = SequenceState("d", 3, ROW)
    object.__setattr__(state, "step", "three")
    return state


async def test_a_message_that_cannot_be_made_ends_what_waits_for_it(
    recorder: RecordingServer,
) -> None:
    async with AsyncClient(recorder.address) as client:
        sequence = client.sequence("sum")
        bad = client.sequence("sum", state=spoiled_state())
        await sequence.open()
        with pytest.raises(SluiceError, match="the client has failed: TypeError"):
            await bad.open()
        with pytest.raises(SluiceError, match="the client has failed: TypeError"):
            await sequence.step([1, 1])
        async with client.sequence("sum") as another:
            assert (await another.step([2, 3])).tolist() == [2, 3]


def test_a_message_that_cannot_be_made_ends_what_threads_wait_for(
    recorder: RecordingServer,
) -> None:
    with Client(recorder.address) as client:
        sequence = client.sequence("sum")
        bad = client.sequence("sum", state=spoiled_state())
        sequence.open()
        with pytest.raises(SluiceError, match="the client has failed: TypeError"):
            bad.open()
        with pytest.raises(SluiceError, match="the client has failed: TypeError"):
            sequence.step([1, 1])
        with client.sequence("sum") as another:
            assert another.step([2, 3]).tolist() == [2, 3]
