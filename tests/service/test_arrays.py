"""Chunks of different lengths, padded and unpadded: nothing lost, nothing mixed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sluice_service.arrays import (
    choose_steps,
    is_finite,
    is_ones,
    numbers,
    ones,
    pad,
    pad_frames,
    starts_of,
    unpad,
)

lengths_of_chunks = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def _rows(count: int, seed: int = 0) -> np.ndarray:
    """Rows that are all different."""
    return np.arange(seed, seed + 2 * count, dtype=np.float32).reshape(count, 2)


@given(lengths_of_chunks)
def test_unpad_is_the_inverse_of_pad(lengths) -> None:
    lengths = np.array(lengths)
    rows = _rows(lengths.sum())
    padded = pad(rows, starts_of(lengths), lengths, int(lengths.max()))
    assert padded.shape == (len(lengths), lengths.max(), 2)
    is_whole = len(set(lengths.tolist())) == 1
    assert (unpad(padded, lengths, is_whole=is_whole) == rows).all()


@given(lengths_of_chunks, st.data())
def test_padding_takes_each_chunk_from_where_it_lies(lengths, data) -> None:
    """Chunks in any order, cut to any length, some left out."""
    starts = np.cumsum([0, *lengths])[:-1]
    rows = _rows(sum(lengths))
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1))
    cuts = [data.draw(st.integers(1, lengths[index])) for index in chosen]
    padded = pad(rows, starts[chosen], np.array(cuts), max(cuts))
    for row, index, cut in zip(padded, chosen, cuts, strict=True):
        assert (row[:cut] == rows[starts[index] : starts[index] + cut]).all()
        # Behind its end a chunk repeats its last row: a value the model accepts.
        assert (row[cut:] == row[cut - 1]).all()


@given(st.lists(lengths_of_chunks, min_size=1, max_size=4), st.randoms())
def test_chunks_of_several_frames_keep_to_their_own(frames, random) -> None:
    arrays, places = [], []
    for number, lengths in enumerate(frames):
        arrays.append([_rows(sum(lengths), 1000 * number), np.arange(sum(lengths)) + 7])
        starts = np.cumsum([0, *lengths])[:-1].tolist()
        places += [(number, *place) for place in zip(starts, lengths, strict=True)]
    random.shuffle(places)
    which, starts, lengths = np.array(places).T
    first, second = pad_frames(arrays, which, starts, lengths, int(lengths.max()))
    for index, (number, start, length) in enumerate(places):
        for padded, source in ((first, arrays[number][0]), (second, arrays[number][1])):
            assert (padded[index, :length] == source[start : start + length]).all()


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.floats(0.05, 1))
def test_the_chosen_steps_keep_the_share_and_never_cut_the_shortest(lengths, share) -> None:
    lengths = np.array(lengths)
    steps = choose_steps(lengths, useful_share=share)
    assert lengths.min() <= steps <= lengths.max()

    def useful(steps: int) -> float:
        return float(np.minimum(lengths, steps).sum()) / (len(lengths) * steps)

    assert useful(steps) >= share - 1e-9
    # And no longer one of the lengths there are would do.
    assert all(useful(longer) < share + 1e-9 for longer in lengths if longer > steps)


@given(lengths_of_chunks)
def test_chunks_begin_where_the_last_one_ended(lengths) -> None:
    expected = [sum(lengths[:index]) for index in range(len(lengths))]
    assert starts_of(np.array(lengths)).tolist() == expected


def test_ones_are_known_as_what_they_are_only_while_they_are() -> None:
    for count in (1, 5, 100_000):
        assert ones(count).tolist() == [1] * count
        assert numbers(count).tolist() == list(range(count))
        assert starts_of(ones(count)).tolist() == list(range(count))
    assert is_ones(ones(5))
    assert not is_ones(np.array([1, 2]))
    chosen = ones(5)[np.array([True, False, True, True, False])]
    assert starts_of(chosen).tolist() == [0, 1, 2]


@given(
    st.lists(
        st.sampled_from([0.0, 1.0, -1e38, 3e38, np.nan, np.inf, -np.inf]), min_size=0, max_size=9
    )
)
def test_one_bad_value_among_good_ones_is_found(values) -> None:
    array = np.array(values, np.float32)
    assert is_finite(array) == bool(np.isfinite(array).all())
