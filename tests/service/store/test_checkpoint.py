"""A checkpoint as bytes: there and back, and never anything else than what was packed."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice_service.errors import DataLossError
from sluice_service.store import Checkpoint, pack, unpack

counts = st.integers(0, 2**64 - 1)
checkpoints = st.builds(
    Checkpoint,
    model_digest=st.text(),
    arithmetic=st.text(),
    step=counts,
    floor=counts,
    clean_under=st.binary(max_size=16),
    row=st.binary(),
    outputs=st.lists(st.binary(), max_size=4).map(tuple),
)

anywhere = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

ONE = Checkpoint("digest", "arithmetic", 7, 5, b"claim", bytes(range(64)), (b"y", b""))


@anywhere
@given(checkpoints)
def test_what_is_packed_is_unpacked_as_it_was(checkpoint: Checkpoint) -> None:
    assert unpack(pack(checkpoint)) == checkpoint


@anywhere
@given(checkpoints, checkpoints)
def test_two_checkpoints_that_differ_have_different_bytes(a: Checkpoint, b: Checkpoint) -> None:
    assert (pack(a) == pack(b)) == (a == b)


@anywhere
@given(checkpoints, st.data())
def test_a_checkpoint_with_one_bit_changed_is_refused(checkpoint, data) -> None:
    damaged = bytearray(pack(checkpoint))
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DataLossError, match="start it again"):
        unpack(bytes(damaged))


@anywhere
@given(checkpoints, st.data())
def test_a_checkpoint_that_is_cut_off_is_refused(checkpoint, data) -> None:
    whole = pack(checkpoint)
    with pytest.raises(DataLossError):
        unpack(whole[: data.draw(st.integers(0, len(whole) - 1))])


@anywhere
@given(st.binary(min_size=1))
def test_a_checkpoint_with_more_behind_it_is_refused(more: bytes) -> None:
    with pytest.raises(DataLossError, match="checksum"):
        unpack(pack(ONE) + more)


@anywhere
@given(st.binary())
def test_bytes_of_something_else_are_refused(data: bytes) -> None:
    with pytest.raises(DataLossError):
        unpack(data)


def test_a_checkpoint_of_another_layout_is_told_apart_from_a_damaged_one() -> None:
    data = bytearray(pack(ONE))
    data[7] = 2
    with pytest.raises(DataLossError, match="not a checkpoint of this version of Sluice"):
        unpack(bytes(data))
