"""Reads lines of CSV or JSON as the inputs of one step each, and writes outputs the same way."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from sluice_protos.contract_pb2 import ModelContract, TensorSpec
from sluice_protos.datatypes import DTYPES

Array = NDArray[Any]

_TRUTHS: Final = {"0": False, "1": True, "false": False, "true": True}


class RowError(ValueError):
    """A line cannot be read as a row; the message names what is expected."""


class Rows(Protocol):
    """One format: lines in, lines out."""

    def read(self, line: str) -> tuple[str, dict[str, Array]] | None:
        """The key and the inputs of one step by name; None for a header. Raises RowError."""
        ...

    def write(self, key: str, outputs: Mapping[str, Array]) -> str:
        """One line, without the line break."""
        ...

    def head(self) -> str | None:
        """The header to write before the first row, if there is one."""
        ...


class CsvRows:
    """Reads and writes CSV. A line has the values of all inputs side by side.

    A first line that is not numbers names the columns. Named columns may be in any order, with
    other columns in between: `x` for an input of one value, `x.0`, `x.1`, … for several values.
    Booleans are 0, 1, false and true.
    """

    def __init__(self, contract: ModelContract, key: str | None) -> None:
        self._inputs = list(contract.inputs)
        self._outputs = list(contract.outputs)
        self._key = key
        self._columns = [name for spec in self._inputs for name in _columns(spec)]
        # The position of each of `_columns` in a line, and of the key.
        self._order: list[int] | None = None
        self._key_at = -1
        # The number of columns that the first line names, if it names any.
        self._width: int | None = None
        _require_free(key, [name for spec in self._outputs for name in _columns(spec)])

    def read(self, line: str) -> tuple[str, dict[str, Array]] | None:
        try:
            values = [value.strip() for value in next(csv.reader([line]))]
        except csv.Error as error:
            raise RowError(f"is not CSV ({error})") from None
        if self._order is None and self._is_header(values):
            return None
        if self._order is None:
            raise RowError("--key needs a first line that names the columns")
        if self._width is not None and len(values) != self._width:
            raise RowError(f"{len(values)} values; the first line names {self._width} columns")
        if self._width is None and len(values) != len(self._columns):
            raise RowError(
                f"{len(values)} values; the model takes {len(self._columns)} "
                f"({', '.join(_describe(spec) for spec in self._inputs)})"
            )
        key = values[self._key_at] if self._key is not None else ""
        return key, self._split([values[at] for at in self._order])

    def write(self, key: str, outputs: Mapping[str, Array]) -> str:
        cells = [key] if self._key is not None else []
        for spec in self._outputs:
            cells += [str(value) for value in np.ravel(outputs[spec.name])]
        return _join(cells)

    def head(self) -> str | None:
        if self._width is None:
            return None
        names = [name for spec in self._outputs for name in _columns(spec)]
        return _join([*([self._key] if self._key is not None else []), *names])

    def _is_header(self, values: Sequence[str]) -> bool:
        """Learn the columns from the first line; True if it names them."""
        if all(map(_is_value, values)):
            if self._key is None:
                self._order = list(range(len(self._columns)))
            return False
        wanted = [*self._columns, *([self._key] if self._key is not None else [])]
        missing = [name for name in wanted if name not in values]
        if missing:
            raise RowError(f"no column {', '.join(map(repr, missing))} among {', '.join(values)}")
        self._width = len(values)
        self._order = [values.index(name) for name in self._columns]
        if self._key is not None:
            self._key_at = values.index(self._key)
        return True

    def _split(self, values: Sequence[str]) -> dict[str, Array]:
        inputs: dict[str, Array] = {}
        at = 0
        for spec in self._inputs:
            size = _size(spec)
            inputs[spec.name] = _parse(spec, values[at : at + size]).reshape(tuple(spec.shape))
            at += size
        return inputs


class JsonRows:
    """Reads and writes JSON lines: the input itself, or an object with a value for each input."""

    def __init__(self, contract: ModelContract, key: str | None) -> None:
        self._inputs = list(contract.inputs)
        self._outputs = list(contract.outputs)
        self._key = key
        _require_free(key, [spec.name for spec in self._outputs])

    def read(self, line: str) -> tuple[str, dict[str, Array]] | None:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise RowError(f"is not JSON ({error})") from None
        except RecursionError:
            raise RowError("is nested too deeply") from None
        names = [spec.name for spec in self._inputs]
        key = ""
        if isinstance(value, dict):
            missing = [name for name in [*names, self._key] if name and name not in value]
            if missing:
                raise RowError(f"has no {', '.join(map(repr, missing))}")
            key = str(value[self._key]) if self._key is not None else ""
            values = [value[name] for name in names]
        elif self._key is not None or len(names) > 1:
            wanted = [*names, *([self._key] if self._key is not None else [])]
            raise RowError(f"is not an object with {', '.join(map(repr, wanted))}")
        else:
            values = [value]
        try:
            return key, {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
        except ValueError:
            raise RowError("has arrays whose rows differ in length") from None

    def write(self, key: str, outputs: Mapping[str, Array]) -> str:
        plain = {spec.name: _plain(np.asarray(outputs[spec.name])) for spec in self._outputs}
        if self._key is not None:
            return json.dumps({self._key: key, **plain})
        return json.dumps(plain if len(plain) > 1 else next(iter(plain.values())))

    def head(self) -> str | None:
        return None


def _require_free(key: str | None, taken: Sequence[str]) -> None:
    """Raise RowError if an output has the name of the key."""
    if key in taken:
        raise RowError(f"--key {key!r} is also the name of an output; rename that column")


def _columns(spec: TensorSpec) -> list[str]:
    size = _size(spec)
    return [spec.name] if size == 1 else [f"{spec.name}.{index}" for index in range(size)]


def _size(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64))


def _describe(spec: TensorSpec) -> str:
    return f"{spec.name}: {DTYPES[spec.datatype].name} {list(spec.shape)}"


def _parse(spec: TensorSpec, values: Sequence[str]) -> Array:
    kind = DTYPES[spec.datatype].kind
    try:
        if kind == "f":
            return np.array([float(value) for value in values])
        if kind == "b":
            return np.array([_TRUTHS[value.lower()] for value in values])
        return np.array([int(value) for value in values])
    except (ValueError, KeyError):
        raise RowError(f"{', '.join(values)} is not {_describe(spec)}") from None


def _is_value(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in _TRUTHS
    return True


def _join(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def _plain(array: Array) -> Any:
    """Nested lists of Python numbers. A float32 gets the fewest digits that identify it.

    NaN and infinity become None: JSON has no numbers for them (RFC 8259, 6).
    """
    if array.ndim:
        return [_plain(part) for part in array]
    if array.dtype.kind == "f":
        return float(str(array[()])) if np.isfinite(array) else None
    return array.item()
