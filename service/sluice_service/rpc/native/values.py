"""Converts messages of sluice.v1 to plain values of the core, and back."""

from sluice_protos import sequences_pb2 as wire
from sluice_service.models.queries import SequenceInfo
from sluice_service.sequences.events import Durable, Ended, Failed, Limits, Notice, Opened
from sluice_service.store.claims import OpenRequest, State


def read_open(message: wire.OpenSequence) -> OpenRequest:
    """What a client asks for when it opens a sequence."""
    return OpenRequest(
        lane=message.lane,
        sequence_id=message.sequence_id,
        mode=message.mode,
        received=message.received if message.HasField("received") else None,
        state=read_state(message.state) if message.HasField("state") else None,
        writer=message.writer,
        attempt=message.attempt,
        expected_epoch=message.expected_epoch,
        durability=message.durability,
    )


def read_fork(message: wire.ForkRequest) -> OpenRequest:
    """How the copy of a sequence is opened."""
    return OpenRequest(
        sequence_id=message.fork_id, writer=message.writer, durability=message.durability
    )


def read_state(message: wire.SequenceState) -> State:
    """A state that a client brings; the inverse of `write_state`."""
    return State(message.model_digest, message.step, message.row)


def write_state(state: State) -> wire.SequenceState:
    """A state that a client has asked for; the inverse of `read_state`."""
    return wire.SequenceState(model_digest=state.model_digest, step=state.step, row=state.row)


def write_info(info: SequenceInfo) -> wire.SequenceInfo:
    """One entry of ListSequences."""
    return wire.SequenceInfo(
        model=info.model,
        sequence_id=info.sequence_id,
        step=info.step,
        epoch=info.epoch,
        is_parked=info.is_parked,
        idle_seconds=info.idle_seconds,
        held_steps=info.held_steps,
        is_elsewhere=info.is_elsewhere,
    )


def put_notice(notice: Notice, response: wire.InferResponse) -> int:
    """Put an event without outputs into a response. Returns the bytes that it takes."""
    match notice:
        case Opened():
            opened = wire.Opened(
                lane=notice.lane,
                sequence_id=notice.sequence_id,
                epoch=notice.epoch,
                applied=notice.applied,
                durable=notice.durable,
                held_from=notice.held_from,
                durability=wire.Durability.ValueType(notice.durability),
            )
            response.opened.append(opened)
            return opened.ByteSize()
        case Failed():
            error = notice.error
            fault = wire.Fault(
                lane=notice.lane,
                reason=wire.Fault.Reason.Value(error.reason),
                code=error.status.value[0],
                message=str(error),
                expected_step=notice.expected_step,
                epoch=error.epoch,
            )
            response.faults.append(fault)
            return fault.ByteSize()
        case Ended():
            reason = wire.Closed.Reason.Value(notice.reason.name)
            closed = wire.Closed(lane=notice.lane, reason=reason)
            response.closed.append(closed)
            return closed.ByteSize()
        case Durable():
            durable = wire.Durable(lane=notice.lane, step=notice.step)
            response.durable.append(durable)
            return durable.ByteSize()
        case Limits():
            limits = wire.Limits(
                request_bytes_max=notice.request_bytes_max,
                chunk_steps_max=notice.chunk_steps_max,
                credit_steps=notice.credit_steps,
                credit_bytes=notice.credit_bytes,
                unacknowledged_steps_max=notice.unacknowledged_steps_max,
            )
            response.limits.CopyFrom(limits)
            return limits.ByteSize()
