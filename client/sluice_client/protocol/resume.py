"""From which step a lane continues, once the server has opened it for the first time or again."""

from typing import Final

import numpy as np

from sluice_client.errors import DataLoss, ProtocolViolation, ReplayNeeded, SluiceError
from sluice_client.protocol.calls import Call
from sluice_client.protocol.lane import Lane, Status
from sluice_client.protocol.signature import Signature
from sluice_client.protocol.steps import Steps
from sluice_client.protocol.tickets import Durability
from sluice_protos import sequences_pb2 as wire
from sluice_protos.sequences_pb2 import Opened

_DURABILITIES: Final[dict["wire.Durability.ValueType", Durability]] = {
    wire.PERIODIC: "periodic",
    wire.STRICT: "strict",
}


def acknowledged(lane: Lane, steps: Steps) -> int:
    """The outputs that an open of this lane acknowledges."""
    if not lane.was_opened and lane.opening.ticket is not None:
        return lane.opening.ticket.received
    return steps.acknowledgements.acknowledged(lane.number)


def start(lane: Lane, opened: Opened, steps: Steps, signature: Signature) -> None:
    """Set the step counts of a new lane from its first Opened."""
    number, ticket, applied = lane.number, lane.opening.ticket, opened.applied
    steps.acknowledgements.await_confirm(number, is_awaiting=lane.opening.holds_outputs)
    steps.replay_buffer.await_durable(number, is_awaiting=opened.durability == wire.PERIODIC)
    if ticket is None:
        # No chunk was sent before: the state that was found is where this handle begins.
        steps.start_at(number, applied, min(opened.durable, applied), applied)
        return
    steps.start_at(number, ticket.received, ticket.durable, max(ticket.received, applied))
    rows = applied - ticket.received
    if rows > 0:
        # Another handle sent these steps: their inputs are unknown here, and never sent.
        inputs = [np.broadcast_to(np.zeros((), np.bool_), rows)]
        outputs = signature.allocate(rows)
        lane.inherited = Call(np.array([number]), np.array([rows]), inputs, outputs)
        lane.inherited.steps = rows
        steps.queue.submit(lane.inherited)


def check(lane: Lane, opened: Opened, steps: Steps) -> SluiceError | None:
    """What is wrong with the step at which the server stands, if anything.

    Sets `lane.replays_from` where the server lacks inputs that another handle had.
    """
    number, applied = lane.number, opened.applied
    lane.replays_from = None
    floor = steps.replay_buffer.replay_floor(number)
    if applied < floor:
        message = f"the server went back to step {applied}, but {floor} steps were durable"
        return DataLoss(message, reason="DATA_LOSS")
    if applied > steps.submitted(number):
        return ProtocolViolation(f"the server claims {applied} steps, which were never sent")
    if steps.lacks_inputs(number, applied):
        if not steps.is_fresh(number):
            return ReplayNeeded(
                f"the server went back to step {applied}, and another handle had the inputs "
                "from there on; resume again with the ticket and replay them"
            )
        lane.replays_from = applied
    return None


def attach(lane: Lane, opened: Opened, steps: Steps) -> None:
    """Send from where the server stands."""
    lane.durability = _DURABILITIES.get(opened.durability, "off")
    is_periodic = lane.durability == "periodic"
    steps.replay_buffer.await_durable(lane.number, is_awaiting=is_periodic)
    steps.attach(lane.number, opened.applied, opened.durable)
    lane.status = Status.ATTACHED
