"""The inputs and outputs of a model: checks and converts a caller's arrays to rows and back.

A caller passes one step or a chunk. Inside the client everything is rows: [rows, …].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sluice_client.errors import InvalidInput, ProtocolViolation
from sluice_protos.contract_pb2 import ModelContract, TensorSpec
from sluice_protos.datatypes import DTYPES
from sluice_protos.sequences_pb2 import Tensor

Array = NDArray[Any]
# The input of a step: an array, or a mapping from input name to array.
Input = ArrayLike | Mapping[str, ArrayLike]
# The output of a step: an array, or a dict by name where the model has several outputs.
Output = Any


@dataclass(frozen=True, slots=True)
class Field:
    """One input or output of a model: the dtype and the shape of one step of it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    valid: tuple[int, int] | None = None

    def describe(self, *leading: str) -> str:
        """Such as `float32 [steps, 8]`."""
        return f"{self.dtype.name} [{', '.join([*leading, *map(str, self.shape)])}]"


class Signature:
    """The inputs and outputs of one model, in the contract's order."""

    def __init__(self, contract: ModelContract) -> None:
        self.inputs = tuple(map(_read_field, contract.inputs))
        self.outputs = tuple(map(_read_field, contract.outputs))
        # The bytes of one step of all inputs, without protobuf's overhead.
        self.step_bytes = sum(_row_bytes(field) for field in self.inputs)

    def is_like(self, other: "Signature") -> bool:
        """Both have the same inputs and outputs."""
        return (self.inputs, self.outputs) == (other.inputs, other.outputs)

    def to_rows(self, x: Input, *leading: int) -> tuple[list[Array], int | None]:
        """A caller's input, copied to rows: ([rows, …] for each input, steps).

        x        `[*leading, …]` for one step, `[*leading, steps, …]` for a chunk,
                 where `…` is the shape of one step; a dict by name for several inputs
        leading  () for a sequence, (sequences,) for a group

        `steps` is None for a single step. Raises InvalidInput.
        """
        if isinstance(x, Mapping):
            values = self._by_name(x)
        elif len(self.inputs) == 1:
            values = [x]
        else:
            names = ", ".join(repr(field.name) for field in self.inputs)
            raise InvalidInput(f"the model has several inputs; give a dict with {names}")
        rows: list[Array] = []
        counts: set[int | None] = set()
        for field, value in zip(self.inputs, values, strict=True):
            array, steps = _field_rows(field, value, leading)
            rows.append(array)
            counts.add(steps)
        if len(counts) > 1:
            raise InvalidInput("the inputs differ in their number of steps")
        return rows, counts.pop()

    def from_rows(self, outputs: Sequence[Array], steps: int | None, *leading: int) -> Output:
        """Rows of all outputs in the caller's shape: the inverse of `to_rows`."""
        shape = leading if steps is None else (*leading, steps)
        arrays = [
            array.reshape(*shape, *field.shape) if shape else array[0]
            for array, field in zip(outputs, self.outputs, strict=True)
        ]
        if len(arrays) == 1:
            return arrays[0]
        return {field.name: array for field, array in zip(self.outputs, arrays, strict=True)}

    def allocate(self, rows: int) -> list[Array]:
        """Zeroed arrays for the outputs of `rows` steps."""
        return [np.zeros((rows, *field.shape), field.dtype) for field in self.outputs]

    def decode(self, tensors: Sequence[Tensor], rows: int) -> list[Array]:
        """The outputs in a message: [rows, …] each. Raises ProtocolViolation."""
        if len(tensors) != len(self.outputs):
            raise ProtocolViolation(
                f"the server sent {len(tensors)} outputs, not {len(self.outputs)}"
            )
        named = {tensor.name: tensor for tensor in tensors}
        arrays: list[Array] = []
        for field, tensor in zip(self.outputs, tensors, strict=True):
            data = named.get(field.name, tensor).data
            if len(data) != rows * _row_bytes(field):
                raise ProtocolViolation(
                    f"output {field.name!r} has {len(data)} bytes for {rows} steps"
                )
            arrays.append(np.frombuffer(data, field.dtype).reshape(rows, *field.shape))
        return arrays

    def _by_name(self, x: Mapping[str, ArrayLike]) -> list[ArrayLike]:
        expected = {field.name for field in self.inputs}
        if set(x) != expected:
            raise InvalidInput(f"the model's inputs are {sorted(expected)}, not {sorted(x)}")
        return [x[field.name] for field in self.inputs]


def _read_field(spec: TensorSpec) -> Field:
    valid = (spec.valid.min, spec.valid.max) if spec.HasField("valid") else None
    return Field(spec.name, DTYPES[spec.datatype], tuple(spec.shape), valid)


def _row_bytes(field: Field) -> int:
    return int(np.prod(field.shape, dtype=np.int64)) * field.dtype.itemsize


def _field_rows(
    field: Field, value: ArrayLike, leading: tuple[int, ...]
) -> tuple[Array, int | None]:
    array = np.asarray(value)
    depth = len(leading)
    is_chunk = array.ndim == depth + 1 + len(field.shape)
    wanted = (*leading, *array.shape[depth : depth + 1], *field.shape)
    if array.shape != (wanted if is_chunk else (*leading, *field.shape)):
        front = list(map(str, leading))
        raise InvalidInput(
            f"input {field.name!r} takes {field.describe(*front)} for one step or "
            f"{field.describe(*front, 'steps')} for a chunk, not shape {list(array.shape)}"
        )
    if array.size == 0 and 0 in array.shape[: depth + 1]:
        raise InvalidInput(f"input {field.name!r} has no steps; a chunk has at least one")
    # A copy: a replay must send the same values, whatever the caller does to the array.
    rows = np.ascontiguousarray(_cast(field, array)).reshape(-1, *field.shape)
    return rows, array.shape[depth] if is_chunk else None


def _cast(field: Field, array: Array) -> Array:
    """A copy of `array` in the field's dtype.

    Floats may lose precision (Python's are float64), integers must fit. Raises InvalidInput.
    """
    kinds = field.dtype.kind, array.dtype.kind
    if array.dtype == field.dtype:
        result = array.astype(field.dtype)
    elif kinds in {("f", "f"), ("f", "i"), ("f", "u"), ("f", "b"), ("b", "b")}:
        try:
            with np.errstate(over="raise"):
                result = array.astype(field.dtype)
        except FloatingPointError:
            raise InvalidInput(f"input {field.name!r} is too large for {field.dtype}") from None
    elif kinds[0] in "iu" and kinds[1] in "iub":
        result = array.astype(field.dtype)
        if not np.array_equal(result, array):
            raise InvalidInput(f"input {field.name!r} is too large for {field.dtype}")
    else:
        raise InvalidInput(
            f"input {field.name!r} takes {field.dtype}; {array.dtype} does not fit: "
            "cast it yourself if that is what you mean"
        )
    if field.valid is not None and result.size:
        low, high = field.valid
        if result.min() < low or result.max() > high:
            raise InvalidInput(f"input {field.name!r} takes values from {low} to {high}")
    return result
