"""What can stop an export; every message names the layer or input and the fix.

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
├── PairingError                 which output is which input's state cannot be told
├── FactoryError                 `package.module:factory` cannot be called
└── CheckpointError              a checkpoint cannot be read or does not fit
"""


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
    """Which inputs of an ONNX file are its state, and where it comes out, cannot be told."""


class FactoryError(ExportError):
    """What should make the module cannot be imported or called."""


class CheckpointError(ExportError):
    """A checkpoint cannot be read, or its weights are not the module's."""


class ExportNotice(UserWarning):
    """Something about an export that its author should know, though nothing is wrong."""


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
