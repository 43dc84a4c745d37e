"""Exports the models that are measured, once: two layers of LSTM with 64 inputs."""

import sys
from pathlib import Path

import torch
from torch import nn

from sluice_export import export

FOLDER = Path(__file__).parents[1] / "build" / "bench"
INPUTS = 64
LAYERS = 2
# What --quick measures.
QUICK_HIDDEN = 128


def export_model(hidden: int) -> Path:
    """The ONNX file of the model with that many hidden units; exported if it does not exist."""
    path = FOLDER / f"lstm-{INPUTS}-{hidden}x{LAYERS}.onnx"
    if not path.exists():
        _export(hidden, path)
    return path


def _export(hidden: int, path: Path) -> None:
    print(f"exporting {path} (once)", file=sys.stderr, flush=True)
    torch.manual_seed(hidden)
    FOLDER.mkdir(parents=True, exist_ok=True)
    export(
        nn.LSTM(INPUTS, hidden, LAYERS, batch_first=True).eval(), torch.zeros(1, 7, INPUTS), path
    )
