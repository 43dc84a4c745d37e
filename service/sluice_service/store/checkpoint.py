"""A sequence at one instant between two runs, as a value and as bytes that prove themselves."""

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
    """All that is needed to go on from `step`, on any server with the same model."""

    model_digest: str
    # Hash of known outputs where it was made: equal hashes, equal bits.
    arithmetic: str
    step: int
    # Outputs from here to `step` are held: their writer may ask for them.
    floor: int
    # The claim under which nothing leaves beyond `step`, because it is strict, or
    # parked, or drained: while the record has no later claim, also a caller that
    # numbers no steps may go on from here. Empty: more may have left.
    clean_under: bytes
    row: bytes  # float32, little-endian, [state_size]
    outputs: tuple[bytes, ...]  # of each model output: rows [step - floor, …]


def pack(checkpoint: Checkpoint) -> bytes:
    """The checkpoint as bytes with a checksum; the inverse of `unpack`."""
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
    """The inverse of `pack`. Raises DataLossError where the bytes are not what was packed."""
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
    """The sizes of so many parts."""
    return struct.Struct(f"<{count}I")


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
