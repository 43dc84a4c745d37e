"""Checks clients' inputs against the contract: datatype, shape, size and value."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sluice_protos.contract_pb2 import ModelContract, TensorSpec
from sluice_protos.datatypes import DTYPES
from sluice_service.arrays import Array, Buffers, Integers, is_finite, is_ones
from sluice_service.errors import InvalidInputError, LaneError, LimitError

# No client has more steps; the sum of two such numbers still fits into 64 bits.
STEPS_MAX = 1 << 61


class Tensor(Protocol):
    """Rows of one input as they arrived; sluice.v1.Tensor has these fields."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def data(self) -> bytes: ...


class _Rule:
    """Checks one input. It reads the spec once, because protobuf fields are slow."""

    __slots__ = ("datatype", "dtype", "name", "range", "refuses_non_finite", "row_bytes", "shape")

    def __init__(self, spec: TensorSpec, *, refuses_non_finite: bool) -> None:
        self.name = spec.name
        self.datatype = spec.datatype
        self.dtype = DTYPES[spec.datatype]
        self.shape = tuple(spec.shape)
        self.row_bytes = int(np.prod(spec.shape, dtype=np.int64)) * self.dtype.itemsize
        self.refuses_non_finite = refuses_non_finite and self.dtype.kind == "f"
        self.range = (spec.valid.min, spec.valid.max) if spec.HasField("valid") else None

    def check(self, tensor: Tensor, rows: int) -> bytes:
        """The bytes of a tensor of [rows, …]. Raises InvalidInputError."""
        datatype, shape, data = tensor.datatype, tensor.shape, tensor.data
        if datatype and datatype != self.datatype:
            raise InvalidInputError(
                f"input {self.name!r} is {datatype}; the model takes {self.datatype}"
            )
        if shape and tuple(shape) != self.shape:
            raise InvalidInputError(
                f"a row of input {self.name!r} has shape {list(shape)}; "
                f"the model takes {list(self.shape)}"
            )
        if len(data) != rows * self.row_bytes:
            raise InvalidInputError(
                f"input {self.name!r} has {len(data)} bytes; {rows} rows of {self.datatype} "
                f"{list(self.shape)} are {rows * self.row_bytes}"
            )
        return data

    def as_rows(self, data: bytes | Array) -> Array:
        """The checked bytes as [rows, …], without a copy."""
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape)

    def is_fine(self, array: Array) -> bool:
        """True when the model can take every value of `array` [rows, …]."""
        if self.range is not None:
            low, high = self.range
            return not array.size or bool(array.min() >= low and array.max() <= high)
        return not self.refuses_non_finite or is_finite(array)

    def bad_rows(self, array: Array) -> Array:
        """[rows] whether each row of `array` [rows, …] has a value that the model cannot take."""
        if self.range is not None:
            is_bad = (array < self.range[0]) | (array > self.range[1])
        else:
            is_bad = ~np.isfinite(array)
        return np.asarray(is_bad.reshape(len(array), -1).any(axis=1))


class InputRules:
    """Checks all inputs of one model."""

    def __init__(
        self, contract: ModelContract, *, chunk_steps_max: int, refuses_non_finite: bool
    ) -> None:
        self.chunk_steps_max = chunk_steps_max
        self._rules = [
            _Rule(spec, refuses_non_finite=refuses_non_finite) for spec in contract.inputs
        ]
        self.count = len(self._rules)
        self._names = [rule.name for rule in self._rules]
        self._no_names = [""] * len(self._rules)
        self.step_bytes = sum(rule.row_bytes for rule in self._rules)
        self.output_step_bytes = sum(
            _Rule(spec, refuses_non_finite=False).row_bytes for spec in contract.outputs
        )

    def check(self, tensors: "Sequence[Tensor]", rows: int) -> list[bytes]:
        """The bytes of [rows, …] for each input, in the contract's order.

        Raises InvalidInputError, which names what was expected.
        """
        if [tensor.name for tensor in tensors] == self._no_names:
            pairs = zip(self._rules, tensors, strict=True)
            return [rule.check(tensor, rows) for rule, tensor in pairs]
        by_name = {tensor.name or self._name(index): tensor for index, tensor in enumerate(tensors)}
        if by_name.keys() != set(self._names) or len(tensors) != len(by_name):
            sent = sorted(tensor.name or self._name(index) for index, tensor in enumerate(tensors))
            raise InvalidInputError(
                f"inputs {sent} were sent; the model takes {sorted(self._names)}, each once"
            )
        return [rule.check(by_name[rule.name], rows) for rule in self._rules]

    def fit(self, data: list[bytes], steps: int) -> bool:
        """True if `data` are the rows of a chunk of `steps`, for each input in order."""
        if len(data) != self.count or not 1 <= steps <= self.chunk_steps_max:
            return False
        pairs = zip(self._rules, data, strict=True)
        return all(len(rows) == steps * rule.row_bytes for rule, rows in pairs)

    def as_rows(self, data: Buffers) -> list[Array]:
        """The checked bytes as one [rows, …] for each input, without a copy."""
        return [rule.as_rows(one) for rule, one in zip(self._rules, data, strict=True)]

    def are_fine(self, arrays: list[Array]) -> bool:
        """True when the model can take every value of `arrays`, one [rows, …] for each input."""
        return all(map(_Rule.is_fine, self._rules, arrays))

    def judge(self, arrays: list[Array], starts: Integers, steps: Integers) -> dict[int, LaneError]:
        """The errors of single chunks, by index: wrong lengths, values the model cannot take.

        `starts` and `steps` [chunks] are the position of each in `arrays` [rows, …].
        """
        errors: dict[int, LaneError] = {}
        if not is_ones(steps) and (steps.min() < 1 or steps.max() > self.chunk_steps_max):
            for index in np.flatnonzero(steps < 1).tolist():
                errors[index] = InvalidInputError("a chunk of 0 steps; send at least one")
            for index in np.flatnonzero(steps > self.chunk_steps_max).tolist():
                errors[index] = LimitError(
                    f"a chunk of {int(steps[index])} steps; chunk_steps_max is "
                    f"{self.chunk_steps_max}: send it in pieces"
                )
        for rule, array in zip(self._rules, arrays, strict=True):
            if rule.is_fine(array):
                continue
            rows = np.flatnonzero(rule.bad_rows(array))
            # The chunk of each row. An empty chunk has the same start as the next one.
            owners = np.searchsorted(starts, rows, side="right") - 1
            within = rows - starts[owners]
            is_owned = (owners >= 0) & (within < steps[owners])
            owners, within = owners[is_owned], within[is_owned]
            indices, places = np.unique(owners, return_index=True)
            for index, step in zip(indices.tolist(), within[places].tolist(), strict=True):
                errors.setdefault(index, _bad_value(rule, step))
        return errors

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else f"number {index}"


def _bad_value(rule: _Rule, step: int) -> InvalidInputError:
    if rule.range is not None:
        return InvalidInputError(
            f"input {rule.name!r} has a value outside {rule.range[0]} to {rule.range[1]} "
            f"in step {step} of the chunk"
        )
    return InvalidInputError(
        f"input {rule.name!r} has NaN or infinity in step {step} of the chunk; "
        "clean the data, or serve with --non-finite allow"
    )
