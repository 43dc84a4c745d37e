"""Checks of a caller's arguments, before they can break the stream that all sequences share."""

from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

_COUNT_MAX: Final = 2**63 - 1


def check_kind(name: str, value: object, kind: type, example: str) -> None:
    """Raises TypeError for a value of another kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {example}, not {value!r}")


def check_text(name: str, value: object) -> None:
    """Raises TypeError for anything but text, ValueError for text that is not valid Unicode."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is text, not {value!r}; convert it with str()")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has half of a surrogate pair: {value!r}") from None


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raises TypeError for anything but a whole number, ValueError for one out of range."""
    if not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if not least <= value <= _COUNT_MAX:
        raise ValueError(f"{name} is from {least} to {_COUNT_MAX}, not {value}")


def check_row(name: str, value: object) -> None:
    """Raises TypeError for anything but an array of floats."""
    kind = cast("NDArray[Any]", value).dtype.kind if isinstance(value, np.ndarray) else None
    if kind != "f":
        raise TypeError(
            f"{name} is an array of float32, not {value!r}; convert it with np.float32(…)"
        )
