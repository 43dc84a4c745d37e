"""From a trained model to an ONNX file that says, and proves, what it is."""

try:
    import onnx
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"exporting needs {error.name}: pip install 'sluice-serving[export]'", name=error.name
    ) from error

from sluice_export.errors import (
    BidirectionalError,
    CheckpointError,
    ExportError,
    ExportNotice,
    FactoryError,
    InputError,
    LayerError,
    NoRecurrentLayerError,
    OutputError,
    ParityError,
    TraceError,
    UnsupportedModuleError,
)
from sluice_export.exporter import TOLERANCE, Progress, export

__all__ = [
    "TOLERANCE",
    "BidirectionalError",
    "CheckpointError",
    "ExportError",
    "ExportNotice",
    "FactoryError",
    "InputError",
    "LayerError",
    "NoRecurrentLayerError",
    "OutputError",
    "ParityError",
    "Progress",
    "TraceError",
    "UnsupportedModuleError",
    "export",
]
