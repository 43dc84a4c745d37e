"""Runs an ONNX file with its contract as a function of inputs, lengths and state.

The exporter proves models with this package and the server serves them with it, so the
code that is proven is the code that serves.
"""

from sluice_model.contract import (
    METADATA_KEY,
    SCHEMA_VERSION,
    compute_digest,
    initial_row,
    read_contract,
    write_contract,
)
from sluice_model.errors import ContractError, ModelError, NotAModelError, RunError
from sluice_model.graph import Graph
from sluice_model.model import Model, example_inputs
from sluice_model.self_test import SelfTest, run_self_test

__all__ = [
    "METADATA_KEY",
    "SCHEMA_VERSION",
    "ContractError",
    "Graph",
    "Model",
    "ModelError",
    "NotAModelError",
    "RunError",
    "SelfTest",
    "compute_digest",
    "example_inputs",
    "initial_row",
    "read_contract",
    "run_self_test",
    "write_contract",
]
