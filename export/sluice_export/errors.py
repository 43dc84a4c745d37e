"""Errors that stop an export, and notices that do not; each message names the fix.

ExportError
├── UnsupportedModuleError       the module does something that cannot be streamed
│   ├── NoRecurrentLayerError    nothing in it carries a state
│   ├── BidirectionalError       a layer needs the future
│   ├── LayerError               a recurrent layer is used in a way that cannot be carried
│   ├── ConvolutionError         a convolution over time needs the future, or cannot be carried
│   └── OutputError              an output has no place in a stream
├── InputError                   the example inputs do not fit the module, or say too little
├── TraceError                   PyTorch's exporter failed
├── ParityError                  a proof failed: the graph is not the module
├── PairingError                 which output holds which state is unclear
├── FactoryError                 `package.module:factory` cannot be called
└── CheckpointError              a checkpoint cannot be read or does not fit
"""

import inspect
import warnings
from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent


class ExportError(Exception):
    """An export stopped and left no file; the message names the fix."""


class UnsupportedModuleError(ExportError):
    """The module does something that cannot be streamed."""


class NoRecurrentLayerError(UnsupportedModuleError):
    """The module has nothing that carries a state."""


class BidirectionalError(UnsupportedModuleError):
    """A layer reads the sequence backwards: it needs the future."""


class LayerError(UnsupportedModuleError):
    """A recurrent layer is used in a way whose state cannot be carried."""


class ConvolutionError(UnsupportedModuleError):
    """A convolution over time needs steps to come, or its context cannot be carried."""


class OutputError(UnsupportedModuleError):
    """An output does not have one row for every step of every sequence."""


class InputError(ExportError):
    """The example inputs do not fit the module, or do not say enough about it."""


class TraceError(ExportError):
    """PyTorch's exporter could not make a graph of the module."""


class ParityError(ExportError):
    """A proof failed: what the graph computes is not what the module computes."""


class PairingError(ExportError):
    """Which inputs of an ONNX file are its state, or which outputs return it, is unclear."""


class FactoryError(ExportError):
    """What should make the module cannot be imported or called."""


class CheckpointError(ExportError):
    """A checkpoint cannot be read, or its weights are not the module's."""


class ExportNotice(UserWarning):
    """Something about an export that its author should know although nothing is wrong."""


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message, or the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def notify(message: str) -> None:
    """Warn the caller of an export, at the line of the call, about something that is not wrong."""
    level, frame = 1, inspect.currentframe()
    while frame and Path(frame.f_code.co_filename).is_relative_to(_FOLDER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ExportNotice, stacklevel=level)
