"""What the server says about lanes (Opened, Fault, Closed), and what follows from each."""

from typing import Final

from sluice_client import errors
from sluice_client.errors import DataLoss, ProtocolViolation, SluiceError
from sluice_client.protocol import resume
from sluice_client.protocol.lane import Lane, Status
from sluice_client.protocol.lifecycle import Lanes
from sluice_client.protocol.signature import Signature
from sluice_protos.sequences_pb2 import Closed, Fault, Opened

# A step that one of these refuses is not applied; the lane stays open.
_STEP_FAULTS: Final = {Fault.INVALID_INPUT, Fault.RUN_FAILED, Fault.NON_FINITE, Fault.LIMIT}
# A close that meets one of these is done: the sequence has ended, or belongs to another.
_GONE: Final = {
    Fault.SEQUENCE_CLOSED,
    Fault.NOT_FOUND,
    Fault.FENCED,
    Fault.STALE,
    Fault.UNKNOWN_LANE,
}


def handle_opened(opened: Opened, lanes: Lanes, signature: Signature) -> None:
    """The server has opened a lane: send from where it stands."""
    lane = lanes.get(opened.lane)
    if lane is None or lane.status is not Status.ASKED:
        return
    lane.is_occupied = lanes.has_opened = True
    lanes.has_recovered |= lane.is_postponed
    lane.is_postponed = False
    if not lane.was_opened:
        resume.start(lane, opened, lanes.steps, signature)
    error = resume.check(lane, opened, lanes.steps)
    if error is not None:
        lanes.end(lane, error)
        return
    resume.attach(lane, opened, lanes.steps)
    if not lane.was_opened:
        lane.was_opened = True
        lane.opened_by.resolve(lane.opened_position)


def handle_fault(fault: Fault, lanes: Lanes) -> None:
    """The server refuses an open, a step, or a close of a lane."""
    lane = lanes.get(fault.lane)
    if lane is None or lane.status in (Status.WAITING, Status.ENDED):
        if lane is not None and fault.reason == Fault.UNAVAILABLE:
            lane.is_occupied = False
            lanes.free(lane)
        return
    received = lanes.steps.received(lane.number)
    error = errors.from_fault(fault, sequence_id=lane.opening.sequence_id, step=received)
    if fault.reason in _GONE or fault.reason == Fault.UNAVAILABLE:
        lane.is_occupied = False
    if fault.reason == Fault.UNAVAILABLE:
        lanes.postpone(lane, fault.message)
    elif lane.status is Status.ASKED:
        _handle_refused_open(lane, fault, error, lanes)
    elif lane.status is Status.ENDING:
        lanes.end(lane, None if lane.is_parking or fault.reason in _GONE else error)
    elif fault.reason in _STEP_FAULTS:
        _handle_refused_step(lane, fault, error, lanes)
    else:
        lanes.end(lane, error)


def _handle_refused_open(lane: Lane, fault: Fault, error: SluiceError, lanes: Lanes) -> None:
    if fault.reason == Fault.UNKNOWN_LANE:
        return  # a late chunk of the sequence that had this lane before
    if fault.reason == Fault.DRAINING:
        lanes.is_draining = True  # the next stream may lead to another server
        lanes.refusal = fault.message
        lanes.reopen(lane)
    elif fault.reason == Fault.CONFLICT and fault.epoch != lane.expected_epoch:
        lane.expected_epoch = fault.epoch
        lanes.reopen(lane)
    elif lane.ended_by is not None and not lane.is_parking and fault.reason in _GONE:
        lanes.end(lane, None)
    else:
        if lane.was_opened:
            error.message = f"it cannot be resumed after {error.step} steps: {error.message}"
        lanes.end(lane, error)


def _handle_refused_step(lane: Lane, fault: Fault, error: SluiceError, lanes: Lanes) -> None:
    # Order within a lane holds: the outputs before the fault have arrived before it.
    steps, received = lanes.steps, lanes.steps.received(lane.number)
    if fault.expected_step == received:
        steps.refuse(lane.number, error)
    elif steps.replay_buffer.replay_floor(lane.number) <= fault.expected_step < received:
        message = f"a step that was applied once is refused now: {error.message}"
        lanes.end(lane, DataLoss(message, reason=error.reason))
    else:
        message = f"a fault names step {fault.expected_step}, not step {received}"
        lanes.end(lane, ProtocolViolation(message))


def handle_closed(closed: Closed, lanes: Lanes) -> None:
    """The server has no sequence on a lane any more."""
    lane = lanes.get(closed.lane)
    if lane is None:
        return
    lane.is_occupied = False
    if closed.reason == Closed.DRAINING:
        lanes.is_draining = True
    if lane.status is Status.ENDED:
        lanes.free(lane)
    elif lane.status is Status.ENDING:
        if closed.reason == Closed.DRAINING and not lane.is_parking:
            lanes.reopen(lane)
        elif lane.is_parking and closed.reason == Closed.IDLE:
            lanes.end(lane, _closed_error(lane, closed, lanes))
        else:
            lanes.end(lane, None)
    elif lane.status is Status.ATTACHED:
        if closed.reason in (Closed.FENCED, Closed.DRAINING, Closed.PARKED):
            lanes.reopen(lane)  # only a refused RESUME is final
        else:
            lanes.end(lane, _closed_error(lane, closed, lanes))


def _closed_error(lane: Lane, closed: Closed, lanes: Lanes) -> SluiceError:
    return errors.from_closed(
        closed.reason,
        sequence_id=lane.opening.sequence_id,
        step=lanes.steps.received(lane.number),
    )
