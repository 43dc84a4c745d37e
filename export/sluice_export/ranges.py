"""Judges the range of valid values of an input before anything is drawn from it."""

from sluice_export.errors import InputError


def require_range(name: str, limits: tuple[int, int] | None, valid: tuple[int, int]) -> None:
    """Raise InputError unless `valid` (first, last) has a value that the input `name` can have.

    `limits` is the smallest and the largest value of its type; None: it has no integers.
    """
    first, last = valid
    if limits is None:
        raise InputError(f"input {name!r} has no integers, so no valid range; leave it out")
    # The last may lie beyond: a byte can index a table of more than 256 rows.
    if not limits[0] <= first <= min(last, limits[1]) or last > 2**63 - 1:
        raise InputError(
            f"input {name!r} cannot have values from {first} to {last}; name a range within "
            f"{limits[0]} to {min(limits[1], 2**63 - 1)}"
        )
