"""The numbers that are stored for every lane and every chunk, as columns of tables.

The step counts of a lane are ordered:

    durable ≤ received ≤ end
    durable ≤ sent     ≤ end

- end: steps that callers have submitted
- sent: steps that the server has, or was sent on the present stream
- received: steps whose outputs have arrived
- durable: steps that no server loses; the inputs after them are retained for a replay

With durability "periodic" a server may go back to its last checkpoint: then `durable`
rises when the server says so. Otherwise `durable` follows `received`.
"""

from typing import Final

import numpy as np

LANE: Final = {
    "received": np.int64,
    "sent": np.int64,
    "end": np.int64,
    "head": np.int64,  # the chunk that holds step `received`
    "cursor": np.int64,  # the chunk that holds step `sent`
    "tail": np.int64,  # the last chunk
    "unacknowledged": np.int64,  # outputs to acknowledge in the next message
    "is_attached": np.bool_,  # the server has opened the lane on this stream
    "has_ended": np.bool_,  # no step will ever be answered
}
# Columns of the same lanes that a plain step does not touch.
LANE_RARE: Final = {
    "durable": np.int64,
    "behind": np.int64,  # outputs below `received` that the server will send again
    "inputs_from": np.int64,  # the first step whose input was submitted here
    "oldest": np.int64,  # the first chunk in the replay buffer, if any
    "newest": np.int64,  # the last of them
    "confirmed": np.int64,  # outputs that the caller has confirmed
    "awaits_durable": np.bool_,  # the server says which steps are durable
    "retains": np.bool_,  # answered chunks go to the replay buffer
    "awaits_confirm": np.bool_,  # outputs are acknowledged when the caller confirms them
}
CHUNK: Final = {
    "first": np.int64,  # steps before it
    "stop": np.int64,  # steps up to its end
    "call": np.int64,  # Call.number
    "position": np.int64,  # in the call
    "row": np.int64,  # in the call's arrays
    "next": np.int64,  # chunk of the same lane
}
