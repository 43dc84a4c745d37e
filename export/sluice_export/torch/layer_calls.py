"""Judges how layers are called: whether their state can be carried, and what it starts from."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sluice_export.errors import LayerError
from sluice_export.torch.layers import RecurrentLayer
from sluice_export.torch.recording import LayerCall, Recording
from sluice_export.torch.signature import LARGE, SMALL


def count_calls(
    layer: RecurrentLayer, small: Sequence[LayerCall], large: Sequence[LayerCall]
) -> tuple[RecurrentLayer, bool]:
    """(`layer` with the number of its runs over the sequence, whether they are loops over time).

    `small` and `large` are its calls in two calls of the module. Raises LayerError where it is
    called neither over the whole sequence nor once for each step.
    """
    if len(small) == len(large) and all(call.sizes == SMALL for call in small):
        return replace(layer, calls=len(small)), False
    calls, rest = divmod(len(small), SMALL[1])
    is_stepwise = all(call.sizes == (SMALL[0], 1) for call in small)
    if rest or calls * LARGE[1] != len(large) or not is_stepwise:
        raise LayerError(
            f"{layer.name} is called {len(small)} times for {SMALL[1]} steps and {len(large)} "
            f"times for {LARGE[1]}; call it once over the whole sequence, or once for each step"
        )
    for before, after in zip(small, small[calls:], strict=False):
        if len(after.before) != len(before.after) or not all(
            map(torch.equal, before.after, after.before)
        ):
            raise LayerError(
                f"{layer.name} is given, at a step, another state than the one it returned at the "
                "step before. A loop over time must pass the state on as it is: a change in "
                "between is not carried"
            )
    return replace(layer, calls=calls), True


def find_initial_states(
    layers: Sequence[RecurrentLayer], small: Recording, large: Recording
) -> dict[str, Tensor]:
    """The initial state of each part that does not start at zero: part name to [hidden_size].

    Raises LayerError where the initial state depends on the input.
    """
    initial: dict[str, Tensor] = {}
    for layer in layers:
        pairs = zip(small.calls(layer), large.calls(layer), strict=False)
        for number, (one, two) in zip(range(layer.calls), pairs, strict=False):
            for state, tensors in zip(
                layer.kind.states, zip(one.before, two.before, strict=True), strict=False
            ):
                rows = torch.cat(tensors, dim=1)
                if not torch.equal(rows, rows[:, :1].expand_as(rows)):
                    raise LayerError(
                        f"{layer.name} starts from a state that is computed from the input; a "
                        "stream carries the state from step to step, so let it start from zeros, "
                        "from a constant, or from an argument of forward"
                    )
                for depth, row in enumerate(rows[:, 0]):
                    if row.any():
                        part = layer.part(number, state, depth)
                        initial[part] = _unproject(layer.module, row, depth)
    return initial


def _unproject(module: nn.Module, row: Tensor, depth: int) -> Tensor:
    """A state before the layer's projection: what projects to `row`; `row` where it has none."""
    if row.shape[0] == module.hidden_size:
        return row
    projection: Tensor = getattr(module, f"weight_hr_l{depth}")
    inverse: Tensor = torch.linalg.pinv(projection.detach().double())
    return (inverse @ row.double()).to(row.dtype)
