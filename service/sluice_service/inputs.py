"""Judges what clients send against the contract: datatype, shape, size and value."""

import numpy as np

from sluice_protos.contract_pb2 import ModelContract, TensorSpec
from sluice_protos.datatypes import DTYPES
from sluice_protos.sequences_pb2 import SequenceState, Tensor
from sluice_service.errors import InvalidInputError, LaneError, LimitError, WrongModelError
from sluice_service.ragged import Array, Integers, is_finite, is_ones

# Numbers of steps beyond this are nonsense, and sums of two of them still fit.
STEPS_MAX = 1 << 61


class InputRules:
    """What one model's inputs must be."""

    def __init__(
        self, contract: ModelContract, *, chunk_steps_max: int, refuses_non_finite: bool
    ) -> None:
        self._contract = contract
        self._chunk_steps_max = chunk_steps_max
        self._refuses_non_finite = refuses_non_finite
        self._names = [spec.name for spec in contract.inputs]
        self._expected = set(self._names)
        # What decoding asks of each input, looked up once: protobuf fields cost time.
        self._specs = [
            (spec.name, DTYPES[spec.datatype], tuple(spec.shape), _row_bytes(spec), spec)
            for spec in contract.inputs
        ]
        self.step_bytes = sum(map(_row_bytes, contract.inputs))
        self.output_step_bytes = sum(map(_row_bytes, contract.outputs))

    def decode(self, tensors: "list[Tensor]", rows: int) -> list[Array]:
        """One [rows, …] for each input, in the contract's order, without a copy.

        Raises InvalidInputError, which names what was expected.
        """
        by_name = {tensor.name or self._name(index): tensor for index, tensor in enumerate(tensors)}
        if by_name.keys() != self._expected or len(tensors) != len(by_name):
            sent = sorted(tensor.name or self._name(index) for index, tensor in enumerate(tensors))
            raise InvalidInputError(
                f"inputs {sent} were sent; the model takes {sorted(self._names)}, each once"
            )
        arrays: list[Array] = []
        for name, dtype, shape, row_bytes, spec in self._specs:
            tensor = by_name[name]
            datatype = tensor.datatype
            if datatype and datatype != spec.datatype:
                raise InvalidInputError(
                    f"input {name!r} is {datatype}; the model takes {spec.datatype}"
                )
            if tensor.shape and tuple(tensor.shape) != shape:
                raise InvalidInputError(
                    f"a row of input {name!r} has shape {list(tensor.shape)}; "
                    f"the model takes {list(shape)}"
                )
            data = tensor.data
            if len(data) != rows * row_bytes:
                raise InvalidInputError(
                    f"input {name!r} has {len(data)} bytes; {rows} rows of {spec.datatype} "
                    f"{list(shape)} are {rows * row_bytes}"
                )
            arrays.append(np.frombuffer(data, dtype).reshape(rows, *shape))
        return arrays

    def judge(self, arrays: list[Array], starts: Integers, steps: Integers) -> dict[int, LaneError]:
        """The errors of single chunks, by index: wrong lengths, values the model cannot take.

        `starts` and `steps` [chunks] say where each lies in `arrays` [rows, …].
        """
        errors: dict[int, LaneError] = {}
        if not is_ones(steps) and (steps.min() < 1 or steps.max() > self._chunk_steps_max):
            for index in np.flatnonzero(steps < 1).tolist():
                errors[index] = InvalidInputError("a chunk of 0 steps; send at least one")
            for index in np.flatnonzero(steps > self._chunk_steps_max).tolist():
                errors[index] = LimitError(
                    f"a chunk of {int(steps[index])} steps; chunk_steps_max is "
                    f"{self._chunk_steps_max}: send it in pieces"
                )
        for spec, array in zip(self._contract.inputs, arrays, strict=True):
            is_bad = self._bad_rows(spec, array)
            if is_bad is None:
                continue
            rows = np.flatnonzero(is_bad)
            # The chunk a row lies in; an empty chunk shares its start with the next.
            owners = np.searchsorted(starts, rows, side="right") - 1
            within = rows - starts[owners]
            is_owned = (owners >= 0) & (within < steps[owners])
            owners, within = owners[is_owned], within[is_owned]
            indices, places = np.unique(owners, return_index=True)
            for index, step in zip(indices.tolist(), within[places].tolist(), strict=True):
                errors.setdefault(index, _bad_value(spec, step))
        return errors

    def state_row(self, state: SequenceState) -> Array:
        """The row [state_size] of a state a client brings.

        Raises WrongModelError or InvalidInputError.
        """
        if state.model_digest != self._contract.digest:
            raise WrongModelError(
                f"the state is of model {state.model_digest[:12]}, this is "
                f"{self._contract.digest[:12]}; a state fits only the model that made it"
            )
        if state.step > STEPS_MAX:
            raise InvalidInputError(f"the state is of step {state.step}; steps end at {STEPS_MAX}")
        expected = 4 * self._contract.state_size
        if len(state.row) != expected:
            raise InvalidInputError(f"the state has {len(state.row)} bytes, not {expected}")
        row = np.frombuffer(state.row, "<f4")
        if self._refuses_non_finite and not np.isfinite(row).all():
            raise InvalidInputError("the state has NaN or infinity")
        return row

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else f"number {index}"

    def _bad_rows(self, spec: TensorSpec, array: Array) -> Array | None:
        """[rows] which rows have a value the model cannot take, or None where none has."""
        if spec.HasField("valid"):
            if not array.size or (array.min() >= spec.valid.min and array.max() <= spec.valid.max):
                return None
            is_bad = (array < spec.valid.min) | (array > spec.valid.max)
        elif self._refuses_non_finite and array.dtype.kind == "f":
            if is_finite(array):
                return None
            is_bad = ~np.isfinite(array)
        else:
            return None
        return np.asarray(is_bad.reshape(len(array), -1).any(axis=1))


def _row_bytes(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * DTYPES[spec.datatype].itemsize


def _bad_value(spec: TensorSpec, step: int) -> InvalidInputError:
    if spec.HasField("valid"):
        return InvalidInputError(
            f"input {spec.name!r} has a value outside {spec.valid.min} to {spec.valid.max} "
            f"in step {step} of the chunk"
        )
    return InvalidInputError(
        f"input {spec.name!r} has NaN or infinity in step {step} of the chunk; "
        "clean the data, or serve with --non-finite allow"
    )
