"""Where a sequence stands at the server that has opened it, and how its lane goes on from there."""

from typing import Final

import numpy as np

from sluice_client.errors import DataLoss, ProtocolViolation, ReplayNeeded, SluiceError
from sluice_client.protocol.calls import Call
from sluice_client.protocol.lane import Lane, Status
from sluice_client.protocol.signature import Signature
from sluice_client.protocol.steps import Ledger
from sluice_client.protocol.tickets import Durability
from sluice_protos import sequences_pb2 as wire
from sluice_protos.sequences_pb2 import Opened

_GIVEN: Final[dict["wire.Durability.ValueType", Durability]] = {
    wire.PERIODIC: "periodic",
    wire.STRICT: "strict",
}


def told(lane: Lane, ledger: Ledger) -> int:
    """What an open of this lane says of the outputs that have arrived."""
    if not lane.was_opened and lane.opening.ticket is not None:
        return lane.opening.ticket.received
    return ledger.acknowledgements.told(lane.number)


def begin(lane: Lane, opened: Opened, ledger: Ledger, signature: Signature) -> None:
    """The first Opened of a handle: from where on its steps count."""
    number, ticket, applied = lane.number, lane.opening.ticket, opened.applied
    ledger.acknowledgements.hold(number, is_holding=lane.opening.holds_outputs)
    ledger.keep(number, is_keeping=opened.durability == wire.PERIODIC)
    if ticket is None:
        # No chunk was sent before: whatever the state holds is where this handle begins.
        ledger.begin(number, applied, min(opened.durable, applied), applied)
        return
    ledger.begin(number, ticket.received, ticket.durable, max(ticket.received, applied))
    rows = applied - ticket.received
    if rows > 0:
        # Another handle has given these inputs; they are not known here, and never sent.
        inputs = [np.broadcast_to(np.zeros((), np.bool_), rows)]
        lane.restored = Call(np.array([number]), np.array([rows]), inputs, signature.allocate(rows))
        ledger.submit(lane.restored)


def judge(lane: Lane, opened: Opened, ledger: Ledger) -> SluiceError | None:
    """What is wrong with where the server stands, if anything."""
    number, applied = lane.number, opened.applied
    ledger.admit()
    lane.replays_from = None
    safe = ledger.safe(number)
    if applied < safe:
        message = f"the server has gone back to step {applied}, but {safe} steps were durable"
        return DataLoss(message, reason="DATA_LOSS")
    if applied > ledger.lanes["end"][number]:
        return ProtocolViolation(f"the server claims {applied} steps, which were never given")
    if ledger.lacks_inputs(number, applied):
        if not ledger.is_fresh(number):
            return ReplayNeeded(
                f"the server has gone back to step {applied}, and the inputs from there on "
                "were given to another handle; resume again with the ticket and replay them"
            )
        lane.replays_from = applied
    return None


def go_on(lane: Lane, opened: Opened, ledger: Ledger) -> None:
    """Send from where the server stands."""
    lane.durability = _GIVEN.get(opened.durability, "off")
    ledger.keep(lane.number, is_keeping=lane.durability == "periodic")
    ledger.attach(lane.number, opened.applied, opened.durable)
    lane.status = Status.ATTACHED
