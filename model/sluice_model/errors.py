"""What can be wrong with a model file or with one run of it.

ModelError
├── NotAModelError   the file is missing, unreadable or not ONNX
├── ContractError    it is ONNX, but its contract is absent or untrue
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
