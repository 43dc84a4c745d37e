"""Messages written and read by hand say what protobuf says."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sluice_protos.sequences_pb2 import InferRequest, InferResponse, OpenSequence, Tensor
from sluice_service.rpc.native.frames import is_bare
from sluice_service.rpc.native.wire import Repeat, encode_outputs

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


requests = st.builds(
    InferRequest,
    model=st.sampled_from(["", "m"]),
    lane=st.lists(st.sampled_from([0, 1, 200]), min_size=1, max_size=2),
    steps=st.lists(st.sampled_from([1, 2]), max_size=1),
    first_step=st.lists(st.just(7), max_size=1),
    inputs=st.lists(
        st.builds(Tensor, name=st.sampled_from(["", "x"]), data=st.binary(min_size=4, max_size=8)),
        min_size=1,
        max_size=2,
    ),
    received_responses=st.sampled_from([0, 5]),
    close=st.lists(st.just(1), max_size=1),
    open=st.lists(st.just(OpenSequence(lane=1)), max_size=1),
)


@given(requests, requests, st.binary(min_size=8, max_size=8))
def test_a_message_is_taken_for_a_repeat_only_where_nothing_but_its_rows_differs(
    first, second, noise
) -> None:
    repeat = Repeat()
    is_learnt = is_bare(first, first.SerializeToString())
    if is_learnt:
        data = first.inputs[0].data
        repeat.learn(first.SerializeToString(), first.lane[0], 1, data)
        same = InferRequest.FromString(first.SerializeToString())
        same.inputs[0].data = noise[: len(data)]
        assert repeat.rows(same.SerializeToString()) == noise[: len(data)]
    rows = repeat.rows(second.SerializeToString())
    if rows is not None:
        assert second.inputs[0].data == rows
        second.inputs[0].data = first.inputs[0].data
        assert second == first and is_learnt


def test_what_has_never_been_learnt_is_no_repeat() -> None:
    assert Repeat().rows(b"") is None


LANE, ROW = b"\x1a\x01\x05", b"\x32\x03\x22\x01\x05"  # lane 5; an input of one byte, 5


@pytest.mark.parametrize(
    "message",
    [
        ROW + LANE,
        ROW + b"\x18\x05",  # the lane unpacked
        LANE + b"\x32\x06\x22\x01\x01\x1a\x01\x01",  # a shape behind the data
        LANE + ROW + b"\x7a\x01\x05",  # a field that nobody knows
        LANE + b"\x32\x06\x22\x01\x05\x7a\x01\x05",  # the same, within the input
        LANE + b"\x32\x06\x22\x01\x09\x22\x01\x05",  # the data twice
    ],
)
def test_a_message_whose_rows_may_not_be_its_last_bytes_is_read_each_time(message) -> None:
    request = InferRequest.FromString(message)
    assert (request.lane, len(request.inputs[0].data)) == ([5], 1)
    assert not is_bare(request, message)
    assert is_bare(InferRequest.FromString(LANE + ROW), LANE + ROW)
