"""Character models learn from a text, and what they learn is exported as they are."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sluice_cli.demo import training
from sluice_cli.demo.training import CHARACTERS, CharacterModel, decode, encode, read_corpus, train

TEXT = "the water goes through the gates of the sluice, one gate at a time.\n" * 100


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@given(st.text(alphabet=CHARACTERS))
def test_a_text_is_decoded_to_itself(text: str) -> None:
    assert decode(encode(text)) == text


@given(st.text())
def test_every_character_has_a_code_and_unknown_ones_become_question_marks(text: str) -> None:
    expected = "".join(c if c in CHARACTERS else "?" for c in text)
    assert decode(encode(text)) == expected


def test_what_is_held_out_is_not_trained_on() -> None:
    trained_on, held_out = read_corpus()
    assert len(trained_on) > 3 * len(held_out) > 100_000
    assert held_out[1000:1200] not in trained_on


def test_windows_go_on_where_the_last_one_ended() -> None:
    codes = np.arange(training.BATCH * training.WINDOW * 3 + 1)
    windows = list(islice(training._windows(codes), 3))
    x = torch.cat([x for x, _ in windows], dim=1)
    y = torch.cat([y for _, y in windows], dim=1)
    assert torch.equal(x.flatten(), torch.from_numpy(codes[:-1]))
    assert torch.equal(y, x + 1)


def test_a_text_too_short_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="4097 characters"):
        train("lstm", "short", seconds=1)


def test_the_carried_state_is_kept_but_for_a_few_whole_rows() -> None:
    torch.manual_seed(0)
    h, c = torch.ones(1, 1000, 3), torch.ones(1, 1000, 3)
    kept_h, kept_c = training._carry((h, c))
    share = 1 - kept_h.mean().item()
    assert share == pytest.approx(training.RESTART_SHARE, abs=0.03)
    assert torch.equal(kept_h, kept_c)
    assert torch.equal(kept_h[..., 0], kept_h[..., 2])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_training_makes_the_text_less_surprising(kind: training.Kind) -> None:
    history: list[training.Progress] = []
    one_second_a_window = count().__next__
    model = train(
        kind, TEXT, seconds=60, units=32, on_progress=history.append, now=one_second_a_window
    )
    assert not model.training
    assert history[0].bits > 6  # of log2(96) = 6.6: nothing is known yet
    assert history[-1].bits < 4.5


def test_dropout_has_one_mask_for_all_steps_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    model = CharacterModel("gru", 8, dropout=0.25)
    dropped = model._drop(torch.ones(200, 5, 50))
    assert torch.equal(dropped[:, 0], dropped[:, 4])
    assert not torch.equal(dropped[0], dropped[1])
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_ends_with_the_training() -> None:
    model = CharacterModel("gru", 8, dropout=0.5).eval()
    x = torch.ones(2, 3, 4)
    assert torch.equal(model._drop(x), x)


def test_the_command_trains_exports_and_tells_how_far_it_is(tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "gates.onnx"
    text.write_text(TEXT)
    command = [sys.executable, "-m", "sluice_cli.demo.training", "gru", "--json", "--seconds", "1"]
    command += ["--units", "8", "--text", str(text), "--output", str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["phase"] for line in lines} == {"train", "export"}
    assert lines[-1]["share"] == 1.0
    assert output.is_file()
