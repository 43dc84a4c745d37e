"""What the contracts of all exported models share: tensor names, state parts, versions, ranges."""

import math
from collections.abc import Sequence
from importlib import metadata
from typing import Final

from sluice_export.errors import InputError
from sluice_protos.contract_pb2 import ModelContract, StatePart

# The tensors that every exported graph has in addition to the model's own.
LENGTHS: Final = "lengths"
STATE: Final = "state"
STATE_OUT: Final = "state_out"


def add_state_part(
    contract: ModelContract, name: str, shape: Sequence[int], initial: Sequence[float]
) -> None:
    """Append a part to the state row of `contract`; an empty `initial` means zeros."""
    contract.state.append(
        StatePart(name=name, offset=contract.state_size, shape=shape, initial=initial)
    )
    contract.state_size += math.prod(shape)


def record_versions(contract: ModelContract, *packages: str) -> None:
    """Record in `contract` the installed versions of `packages`."""
    for package in packages:
        contract.made_with[package] = metadata.version(package)


def require_range(name: str, limits: tuple[int, int] | None, valid: tuple[int, int]) -> None:
    """Raise InputError unless the input `name` can have a value in `valid` (first, last).

    `limits` are the smallest and the largest value of its type; None for other types than
    integers.
    """
    first, last = valid
    if limits is None:
        raise InputError(f"input {name!r} has no integers, so no valid range; leave it out")
    # `last` may exceed the type's limit: a byte can index a table of more than 256 rows.
    if not limits[0] <= first <= min(last, limits[1]) or last > 2**63 - 1:
        raise InputError(
            f"input {name!r} cannot have values from {first} to {last}; name a range within "
            f"{limits[0]} to {min(limits[1], 2**63 - 1)}"
        )
