"""A checkpoint of a sequence, as a value and as bytes with a checksum."""

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache

from sluice_service.errors import DataLossError

_MAGIC = b"sluice\x00\x01"  # the last byte is the version of the layout
_CHECKSUM_BYTES = 16
_FIXED = struct.Struct("<QQI")  # step, floor, how many parts


@dataclass(slots=True)
class Checkpoint:
    """All that a server with the same model needs to continue from `step`."""

    model_digest: str
    # Hash of known outputs on the machine that made it: equal hashes mean equal bits.
    arithmetic: str
    step: int
    # The outputs from here to `step` are held, because the writer may still ask for them.
    floor: int
    # The claim under which no output beyond `step` was sent, because the sequence is strict,
    # parked or drained. Until a later claim, a caller that numbers no steps may continue from
    # here, too. Empty: more outputs may have been sent.
    clean_under: bytes
    row: bytes  # float32, little-endian, [state_size]
    outputs: tuple[bytes, ...]  # of each model output: rows [step - floor, …]


def pack(checkpoint: Checkpoint) -> bytes:
    """The checkpoint as bytes with a checksum. The inverse of `unpack`."""
    parts = (
        checkpoint.model_digest.encode(),
        checkpoint.arithmetic.encode(),
        checkpoint.clean_under,
        checkpoint.row,
        *checkpoint.outputs,
    )
    fixed = _FIXED.pack(checkpoint.step, checkpoint.floor, len(parts))
    body = b"".join((fixed, _sizes(len(parts)).pack(*map(len, parts)), *parts))
    return _MAGIC + _checksum(body) + body


def unpack(data: bytes) -> Checkpoint:
    """The inverse of `pack`. Raises DataLossError if the bytes are damaged."""
    start = len(_MAGIC) + _CHECKSUM_BYTES
    body = data[start:]
    if data[: len(_MAGIC)] != _MAGIC:
        raise DataLossError(
            "the stored record is not a checkpoint of this version of Sluice; "
            "close the sequence and start it again"
        )
    if data[len(_MAGIC) : start] != _checksum(body):
        raise DataLossError(
            "the stored checkpoint fails its checksum; restore the store from a backup, or close "
            "the sequence and start it again"
        )
    step, floor, count = _FIXED.unpack_from(body)
    position = _FIXED.size + _sizes(count).size
    parts = []
    for size in _sizes(count).unpack_from(body, _FIXED.size):
        parts.append(body[position : position + size])
        position += size
    digest, arithmetic, clean_under, row, *outputs = parts
    return Checkpoint(
        digest.decode(), arithmetic.decode(), step, floor, clean_under, row, tuple(outputs)
    )


@lru_cache
def _sizes(count: int) -> struct.Struct:
    """The layout of the sizes of `count` parts."""
    return struct.Struct(f"<{count}I")


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
