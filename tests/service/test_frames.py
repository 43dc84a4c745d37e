"""Messages written by hand say what protobuf says."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from sluice_protos.sequences_pb2 import InferResponse, Tensor
from sluice_service.rpc.native.wire import encode_outputs

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
