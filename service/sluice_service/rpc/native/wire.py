"""Writes responses with outputs as bytes, without a protobuf object."""

from collections.abc import Sequence

import numpy as np

from sluice_service.arrays import Integers

# Tags of sluice.v1: the number of a field, with the type of a field with a length.
_LANE, _STEPS, _FIRST_STEP, _OUTPUTS, _DATA = b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x22"
# From this many numbers on, arrays are faster than single numbers, with the mixture of a response:
# lanes and steps of one byte, first steps of two.
_MANY = 48


def encode_outputs(
    lanes: Integers, steps: Integers, first: Integers, outputs: Sequence[bytes]
) -> bytes:
    """An InferResponse with these chunks and nothing else; arrays of [chunks].

    Serialized by hand because a message object copies the outputs twice, and takes longer
    for one step than the rest of what a response costs here.
    """
    parts = [_packed(_LANE, lanes), _packed(_STEPS, steps), _packed(_FIRST_STEP, first)]
    for output in outputs:
        size = _varint(len(output))
        parts += (_OUTPUTS, _varint(1 + len(size) + len(output)), _DATA, size, output)
    return b"".join(parts)


def _packed(tag: bytes, values: Integers) -> bytes:
    """A packed field of integers [n], none negative."""
    is_many = len(values) >= _MANY
    body = _as_varints(values) if is_many else b"".join(map(_varint, values.tolist()))
    return tag + _varint(len(body)) + body


def _as_varints(values: Integers) -> bytes:
    """As `_as_varint`, for many numbers."""
    largest = int(values.max())
    if largest <= 0x7F:
        return values.astype(np.uint8).tobytes()
    sevens = 7 * np.arange((largest.bit_length() + 6) // 7)
    rests = values[:, np.newaxis] >> sevens  # [n, bytes]
    encoded = (rests & 0x7F | (rests > 0x7F) * 0x80).astype(np.uint8)
    is_there = rests > 0
    is_there[:, 0] = True
    return encoded[is_there].tobytes()


def _varint(value: int) -> bytes:
    return _VARINTS[value] if value < len(_VARINTS) else _as_varint(value)


def _as_varint(value: int) -> bytes:
    """Seven bits in each byte, the lowest first; all but the last have the eighth bit set."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


_VARINTS = [_as_varint(value) for value in range(1 << 14)]
