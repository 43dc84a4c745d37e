"""Structured arrays whose rows are allocated and freed, and the array operations on row numbers."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

# Stands for "no row" where a row number is stored.
NONE: Final = -1

_FIRST: Final = np.zeros(1, np.int64)
_ONE_PASS: Final[list[Any]] = [slice(None)]


class Table:
    """A structured array that grows by doubling; rows are addressed by number.

    `rare` holds the columns that a plain step does not need. They are stored apart
    because the cost of copying whole rows grows with their size.
    """

    def __init__(
        self, columns: dict[str, Any], rare: dict[str, Any] | None = None, size: int = 16
    ) -> None:
        self.rows = np.zeros(size, np.dtype(list(columns.items())))
        self.rare = np.zeros(size, np.dtype(list((rare or {}).items())))
        # A stack of free numbers, the lowest on top.
        self._free = np.arange(size - 1, -1, -1, dtype=np.int64)
        self._free_count = size

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self.rows[column]

    def __len__(self) -> int:
        return len(self.rows)

    def allocate(self, count: int) -> Numbers:
        """The numbers of `count` free rows."""
        while self._free_count < count:
            self._grow()
        self._free_count -= count
        allocated = self._free[self._free_count : self._free_count + count]
        return allocated[::-1].copy()

    def free(self, numbers: Numbers) -> None:
        """The inverse of `allocate`."""
        self._free[self._free_count : self._free_count + len(numbers)] = numbers
        self._free_count += len(numbers)

    def _grow(self) -> None:
        size = len(self.rows)
        self.rows = _double(self.rows)
        self.rare = _double(self.rare)
        free = np.empty(2 * size, np.int64)
        free[:size] = np.arange(2 * size - 1, size - 1, -1)
        free[size : size + self._free_count] = self._free[: self._free_count]
        self._free = free
        self._free_count += size


def _double(rows: NDArray[np.void]) -> NDArray[np.void]:
    more = np.zeros(2 * len(rows), rows.dtype)
    more[: len(rows)] = rows
    return more


def expand(starts: Numbers, counts: Numbers) -> Numbers:
    """The numbers start, start + 1, … of each run, concatenated."""
    total = int(counts.sum())
    if total == len(starts):
        return starts
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(total, dtype=np.int64)


def first_occurrences(numbers: Numbers) -> Numbers:
    """Where each number appears for the first time, in order of appearance."""
    if len(numbers) == 1:
        return _FIRST
    index = np.unique(numbers, return_index=True)[1]
    index.sort()
    return index


def passes(numbers: Numbers) -> list[Any]:
    """Indices that split an array into passes: each has every number once, in order."""
    if len(numbers) == 1 or 1 < len(numbers) == len(first_occurrences(numbers)):
        return _ONE_PASS
    indices: list[Any] = []
    left = np.arange(len(numbers))
    while left.size:
        first = first_occurrences(numbers[left])
        indices.append(left[first])
        left = np.delete(left, first)
    return indices


def groups(numbers: Numbers) -> tuple[Numbers, list[tuple[int, int, int]]]:
    """An order that brings equal numbers together, and (number, start, stop) of each run in it."""
    if len(numbers) == 1:
        return _FIRST, [(int(numbers[0]), 0, 1)]
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    borders = (np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist()
    starts = [0, *borders]
    stops = [*borders, len(numbers)]
    return order, list(zip(ordered[starts].tolist(), starts, stops, strict=True))
