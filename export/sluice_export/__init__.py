"""From a trained model to an ONNX file that says, and proves, what it is."""

try:
    import onnx
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"exporting needs {error.name}: pip install 'sluice-serving[export]'", name=error.name
    ) from error

from sluice_export.delivery import TOLERANCE, Progress
from sluice_export.errors import (
    BidirectionalError,
    CheckpointError,
    ConvolutionError,
    ExportError,
    ExportNotice,
    FactoryError,
    InputError,
    LayerError,
    NoRecurrentLayerError,
    OutputError,
    PairingError,
    ParityError,
    TraceError,
    UnsupportedModuleError,
)
from sluice_export.exporter import export
from sluice_export.onnx.conversion import export_onnx
from sluice_export.verification import verify

__all__ = [
    "TOLERANCE",
    "BidirectionalError",
    "CheckpointError",
    "ConvolutionError",
    "ExportError",
    "ExportNotice",
    "FactoryError",
    "InputError",
    "LayerError",
    "NoRecurrentLayerError",
    "OutputError",
    "PairingError",
    "ParityError",
    "Progress",
    "TraceError",
    "UnsupportedModuleError",
    "export",
    "export_onnx",
    "verify",
]
