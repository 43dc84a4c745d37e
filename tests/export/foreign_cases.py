"""What must be found in each of the foreign models, and how to run one by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tests.export import foreign_models as made


@dataclass(frozen=True)
class Case:
    """A file, what is said of it, and what must be found."""

    write: Callable[[Path], Path]
    # Each state input: its shape for one row, and where it comes out.
    states: dict[str, tuple[list[int], str, int | None]]
    options: dict[str, Any] = field(default_factory=dict)
    # The batch and time axis of each input and output; no time axis: None.
    axes: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    batch_max: int = 0
    has_lengths: bool = False
    is_exact: bool = True
    fixed: dict[str, Any] = field(default_factory=dict)


RATE = {"sr": np.array(16000)}
LSTMS = {name: ([1, 1, 12], "states", at) for at, name in enumerate(("h1", "c1", "h2", "c2"))}
CASES = {
    "voice": Case(
        made.write_voice_detector,
        {"state": ([2, 1, 128], "stateN", None)},
        {"fixed": {"sr": 16000}, "axes": {"input": ("batch", 576)}},
        {"input": (0, None), "output": (0, None)},
        fixed=RATE,
    ),
    "mask": Case(
        made.write_noise_mask,
        {"input_3": ([1, 2, 128, 2], "Identity_1", None)},
        axes={"input_2": (0, None), "Identity": (0, None)},
    ),
    "enhancer": Case(
        made.write_speech_enhancer,
        {
            "conv_cache": ([2, 1, 8, 2, 33], "conv_cache_out", None),
            "tra_cache": ([1, 1, 8], "tra_cache_out", None),
            "inter_cache": ([1, 33, 8], "inter_cache_out", None),
        },
        axes={"mix": (0, None), "enh": (0, None)},
        batch_max=1,
    ),
    "stacked": Case(
        made.write_stacked_states,
        LSTMS,
        axes={"features": (0, 1), "scores": (0, 1)},
        has_lengths=True,
    ),
    "predictor": Case(
        made.write_predictor,
        {"h": ([2, 1, 16], "next_h", None), "c": ([2, 1, 16], "next_c", None)},
        axes={"y": (0, None), "decoder_out": (0, None)},
    ),
    "hidden": Case(made.write_hidden_state, {}, axes={"x": (0, 1), "y": (0, 1)}, has_lengths=True),
    "constant": Case(
        made.write_constant_start, {}, axes={"x": (0, 1), "y": (0, 1)}, has_lengths=True
    ),
    "convolution": Case(
        made.write_causal_convolution,
        {"cache_in": ([1, 4, 2], "cache_out", None)},
        axes={"x": (0, 2), "y": (0, 2)},
        is_exact=False,
    ),
    "lone": Case(
        made.write_one_row_only,
        {"h": ([1, 1, 6], "h_out", None)},
        axes={"x": (0, None), "y": (0, None)},
        batch_max=1,
    ),
}


def drive(path: Path, case: Case, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One sequence by hand through the file as it was made: [steps, …] to [steps, …]."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    kinds = {value.name: types[value.type] for value in session.get_inputs()}
    feed = {name: np.zeros(shape, kinds[name]) for name, (shape, _, _) in case.states.items()}
    feed |= case.fixed
    steps = len(next(iter(inputs.values())))
    width = steps if any(time is not None for _, time in case.axes.values()) else 1
    pieces: dict[str, list[np.ndarray]] = {}
    for start in range(0, steps, width):
        for name, array in inputs.items():
            batch, time = case.axes[name]
            row = array[start : start + width]
            if time is None:
                feed[name] = np.expand_dims(row[0], batch)
            else:
                feed[name] = np.moveaxis(row[np.newaxis], (0, 1), (batch, time))
        names = [value.name for value in session.get_outputs()]
        results = dict(zip(names, session.run(names, feed), strict=True))
        for name, (_, output, index) in case.states.items():
            feed[name] = results[output] if index is None else results[output][index]
        for name in names:
            if name in case.axes:
                batch, time = case.axes[name]
                row = results[name].take(0, batch)
                row = (
                    row[np.newaxis] if time is None else np.moveaxis(row, time - (batch < time), 0)
                )
                pieces.setdefault(name, []).append(row)
    return {name: np.concatenate(rows) for name, rows in pieces.items()}
