"""Exports trained models to ONNX files that carry their own contract and proofs.

Each package imports from those to its right only, `torch` and `onnx` never from each other:
`exporter` and `verification` → `torch`, `onnx` → `proof` → the other files at the root.
"""

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

try:
    from sluice_export.exporter import export, export_onnx
    from sluice_export.proof.evidence import TOLERANCE
    from sluice_export.proof.proofs import Progress
    from sluice_export.verification import verify
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"exporting needs {error.name}: pip install 'sluice-serving[export]'", name=error.name
    ) from error

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
