"""Converts one input or output of a model from and to the Open Inference Protocol."""

import numpy as np

from sluice_protos.contract_pb2 import TensorSpec
from sluice_protos.datatypes import DTYPES
from sluice_protos.open_inference_pb2 import ModelInferRequest
from sluice_service.arrays import Array
from sluice_service.errors import InvalidInputError, RequestError

InputTensor = ModelInferRequest.InferInputTensor

# The field of typed contents for each datatype.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


class TensorFormat:
    """One input or output. It reads the spec once, because protobuf fields are slow."""

    __slots__ = ("_rank", "_size", "datatype", "dtype", "name", "shape")

    def __init__(self, spec: TensorSpec) -> None:
        self.name = spec.name
        self.datatype = spec.datatype
        self.dtype = DTYPES[spec.datatype]
        self.shape = tuple(spec.shape)
        self._rank = len(self.shape)
        self._size = int(np.prod(self.shape, dtype=np.int64))

    def read_shape(self, tensor: InputTensor) -> tuple[int, int, bool]:
        """The batch, the steps, and whether the shape has a time axis."""
        if tensor.datatype != self.datatype:
            if tensor.datatype == "BYTES":
                raise InvalidInputError(
                    f"input {self.name!r} is BYTES; models here take no strings: send "
                    f"{self.datatype}"
                )
            raise InvalidInputError(
                f"input {self.name!r} is {tensor.datatype!r}; the model takes {self.datatype!r}"
            )
        for key in tensor.parameters:
            if key.startswith("shared_memory"):
                raise RequestError(
                    f"input {self.name!r} lies in shared memory, which is not served here; send "
                    "its values in raw_input_contents"
                )
        shape = tuple(tensor.shape)
        lead = shape[: len(shape) - self._rank]
        if shape[len(lead) :] != self.shape or len(lead) not in (1, 2):
            step = ", ".join(map(str, self.shape))
            tail = f", {step}" if step else ""
            raise InvalidInputError(
                f"input {self.name!r} has shape {list(shape)}; the model takes [batch{tail}], or "
                f"[batch, steps{tail}]"
            )
        if min(lead) < 1:
            raise InvalidInputError(
                f"input {self.name!r} has shape {list(shape)}; send at least one step"
            )
        return lead[0], lead[1] if len(lead) == 2 else 1, len(lead) == 2

    def read(self, tensor: InputTensor, raw: bytes | None, rows: int) -> Array:
        """The values that were sent, as [rows, …]."""
        expected = rows * self._size
        if raw is not None:
            if len(raw) != expected * self.dtype.itemsize:
                raise InvalidInputError(
                    f"input {self.name!r} has {len(raw)} bytes; its shape needs "
                    f"{expected * self.dtype.itemsize}"
                )
            return np.frombuffer(raw, self.dtype).reshape(rows, *self.shape)
        field = _CONTENTS.get(self.datatype)
        if field is None:
            raise InvalidInputError(
                f"input {self.name!r} is {self.datatype}, which has no typed contents; send "
                "raw_input_contents"
            )
        values = getattr(tensor.contents, field)
        if len(values) != expected:
            raise InvalidInputError(
                f"input {self.name!r} has {len(values)} values in {field}; its shape needs "
                f"{expected}"
            )
        try:
            return np.array(values, self.dtype).reshape(rows, *self.shape)
        except OverflowError as error:
            raise InvalidInputError(
                f"input {self.name!r} has a value that is not {self.datatype}"
            ) from error
