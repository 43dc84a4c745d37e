"""Messages read and written by hand say what protobuf says."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from sluice_protos.sequences_pb2 import InferRequest, InferResponse, OpenSequence, Tensor
from sluice_service.rpc.native.wire import decode_single, encode_outputs
from sluice_service.sequences.table import NONE

numbers_32 = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
steps_64 = st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1))
chunks = st.lists(st.tuples(numbers_32, numbers_32, steps_64), min_size=1, max_size=80)


@given(chunks, st.lists(st.binary(max_size=300), max_size=3))
@example([(2**32 - 1, 2**14, 2**63 - 1)], [bytes(2**14), b""])
@example([(number, 1 << number, number << 14) for number in range(32)] * 2, [bytes(2**14), b""])
def test_outputs_are_encoded_as_protobuf_does(chunks, outputs) -> None:
    lanes, steps, first = (list(column) for column in zip(*chunks, strict=True))
    expected = InferResponse(
        lane=lanes, steps=steps, first_step=first, outputs=[Tensor(data=data) for data in outputs]
    )
    arrays = (np.array(column) for column in (lanes, steps, first))
    assert InferResponse.FromString(encode_outputs(*arrays, outputs)) == expected


def _check(message: bytes, inputs: int = 1) -> bool:
    """True where a message is decoded by hand; then protobuf reads the same, and nothing more."""
    decoded = decode_single(message, inputs)
    if decoded is None:
        return False
    received, (lane, steps, first, rows) = decoded
    request = InferRequest.FromString(message)
    assert list(request.steps) in ([], [steps])
    assert list(request.first_step) == ([] if first == NONE else [first])
    expected = InferRequest(
        lane=[lane],
        steps=request.steps,
        first_step=request.first_step,
        inputs=[Tensor(data=data) for data in rows],
        received_responses=received,
    )
    assert request == expected
    return True


singles = st.builds(
    InferRequest,
    lane=st.lists(numbers_32, min_size=1, max_size=1),
    steps=st.lists(numbers_32, max_size=1),
    first_step=st.lists(st.integers(0, 2**61), max_size=1),
    inputs=st.lists(st.builds(Tensor, data=st.binary(max_size=300)), min_size=1, max_size=3),
    received_responses=st.one_of(st.just(0), st.integers(0, 2**63 - 1)),
)
requests = st.builds(
    InferRequest,
    model=st.sampled_from(["", "m"]),
    lane=st.lists(numbers_32, max_size=2),
    steps=st.lists(numbers_32, max_size=2),
    first_step=st.lists(st.integers(0, 2**64 - 1), max_size=2),
    inputs=st.lists(
        st.builds(Tensor, name=st.sampled_from(["", "x"]), data=st.binary(max_size=8)), max_size=2
    ),
    received_responses=st.integers(0, 2**64 - 1),
    close=st.lists(st.just(1), max_size=1),
    open=st.lists(st.just(OpenSequence(lane=1)), max_size=1),
)


@given(singles.filter(lambda request: all(one.data for one in request.inputs)))
def test_a_message_of_one_chunk_is_decoded_by_hand(request) -> None:
    message = request.SerializeToString()
    assert _check(message, len(request.inputs))
    assert not _check(message, len(request.inputs) + 1)


@given(requests)
def test_whatever_a_message_says_it_is_decoded_as_protobuf_does_or_not_at_all(request) -> None:
    for inputs in range(3):
        _check(request.SerializeToString(), inputs)


@given(singles, st.data())
def test_a_message_with_a_byte_changed_is_decoded_as_protobuf_does_or_not_at_all(
    request, data
) -> None:
    message = bytearray(request.SerializeToString())
    place = data.draw(st.integers(0, len(message) - 1))
    match data.draw(st.sampled_from(("set", "cut", "insert"))):
        case "set":
            message[place] = data.draw(st.integers(0, 255))
        case "cut":
            del message[place:]
        case "insert":
            message.insert(place, data.draw(st.integers(0, 255)))
    try:
        InferRequest.FromString(bytes(message))
    except DecodeError:
        assert decode_single(bytes(message), len(request.inputs)) is None
    else:
        _check(bytes(message), len(request.inputs))


LANE, ROW = b"\x1a\x01\x05", b"\x32\x03\x22\x01\x05"  # lane 5; an input of one byte, 5


@pytest.mark.parametrize(
    "message",
    [
        b"",
        LANE,
        ROW + LANE,
        ROW + b"\x18\x05",  # the lane unpacked
        b"\x1a\x02\x05\x06" + ROW,  # two lanes
        LANE + b"\x32\x06\x22\x01\x01\x1a\x01\x01",  # a shape behind the data
        LANE + ROW + b"\x7a\x01\x05",  # a field that nobody knows
        LANE + b"\x32\x06\x22\x01\x05\x7a\x01\x05",  # the same, within the input
        LANE + b"\x32\x06\x22\x01\x09\x22\x01\x05",  # the data twice
        LANE + ROW + LANE,
        LANE + ROW * 2,  # more inputs than the model has
    ],
)
def test_a_message_in_another_form_is_left_to_protobuf(message) -> None:
    assert decode_single(message, 1) is None
    assert _check(LANE + ROW)
