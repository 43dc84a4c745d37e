"""Defines the errors of model files and of their runs.

ModelError
├── NotAModelError   the file is missing, unreadable or not ONNX
├── ContractError    it is ONNX, but its contract is missing or wrong
└── RunError         ONNX Runtime refused or failed a run
"""


class ModelError(Exception):
    """Something is wrong with a model; the message names the fix."""


class NotAModelError(ModelError):
    """The file cannot be read as an ONNX model."""


class ContractError(ModelError):
    """The file has no contract, or one that does not describe the graph."""


class RunError(ModelError):
    """A run failed; no state has changed."""
