"""Imports the protobuf messages of ONNX without the rest of the onnx package.

Importing the whole package takes twenty times as long, at every start of a server.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto, ValueInfoProto
else:

    def _load_messages() -> ModuleType:
        """The module with the messages. Protobuf has one class for each, however it is loaded."""
        package = find_spec("onnx")
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        path = Path(package.submodule_search_locations[0], "onnx_ml_pb2.py")
        spec = spec_from_file_location("sluice_model.onnx_ml_pb2", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    _messages = _load_messages()
    ModelProto = _messages.ModelProto
    TensorProto = _messages.TensorProto
    ValueInfoProto = _messages.ValueInfoProto

__all__ = ["ModelProto", "TensorProto", "ValueInfoProto"]
