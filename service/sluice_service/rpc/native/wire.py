"""Reads and writes the most frequent messages of a stream without a protobuf object."""

from collections.abc import Sequence

import numpy as np

from sluice_service.arrays import Integers
from sluice_service.batching.inputs import STEPS_MAX
from sluice_service.sequences.table import NONE

# Tags of sluice.v1: the number of a field, with the type of a field with a length.
_LANE, _STEPS, _FIRST_STEP, _OUTPUTS, _DATA = b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x22"
# From this many numbers on, arrays are faster than single numbers, with the mixture of a response:
# lanes and steps of one byte, first steps of two.
_MANY = 48


# The same of an InferRequest and its Tensor, as numbers; and the type of a field with a number.
_LANE_IN, _STEPS_IN, _FIRST_STEP_IN, _INPUT_IN, _RESPONSES_IN = 0x1A, 0x22, 0x2A, 0x32, 0x50
_DATA_IN = 0x22
_UINT32_MAX = 0xFFFF_FFFF


def decode_single(
    message: bytes, inputs: int
) -> tuple[int, tuple[int, int, int, list[bytes]]] | None:
    """An InferRequest with one chunk and this many `inputs`, which have data and nothing else.

    The responses that its client has read; and the lane, the steps, the first step (or NONE)
    and the rows for each input. None for every other message: protobuf reads it. Nothing is
    checked against the model.
    """
    try:
        lane, at = _read_packed(message, _LANE_IN, 0)
        steps, at = _read_packed(message, _STEPS_IN, at) if message[at] == _STEPS_IN else (1, at)
        first = NONE
        if message[at] == _FIRST_STEP_IN:
            first, at = _read_packed(message, _FIRST_STEP_IN, at)
        rows, size, received = list[bytes](), len(message), 0
        for _ in range(inputs):
            tag, (length, start) = at, _read_varint(message, at + 1)
            at = start + length
            length, begin = _read_varint(message, start + 1)
            if message[tag] != _INPUT_IN or message[start] != _DATA_IN or begin + length != at:
                return None
            rows.append(message[begin:at])
        if at < size and message[at] == _RESPONSES_IN:
            received, at = _read_varint(message, at + 1)
    except (IndexError, ValueError):
        return None
    is_usual = lane <= _UINT32_MAX and steps <= _UINT32_MAX and first <= STEPS_MAX
    return (received, (lane, steps, first, rows)) if at == size and is_usual else None


def _read_packed(message: bytes, tag: int, at: int) -> tuple[int, int]:
    """The only number of a packed field at `at`, and where the next field begins.

    Raises ValueError for another field or another count, IndexError at the end of the message.
    """
    value, end = _read_varint(message, at + 2)
    if message[at] != tag or end != at + 2 + message[at + 1]:
        raise ValueError
    return value, end


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends. Raises IndexError, ValueError."""
    value = message[at]
    if value <= 0x7F:
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 63, 7):
        at += 1
        byte = message[at]
        value |= (byte & 0x7F) << shift
        if byte <= 0x7F:
            return value, at + 1
    raise ValueError  # beyond 63 bits


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
