"""Makes example inputs of a module: from a description, or guessed from its layers."""

import re

import torch
from torch import Tensor, nn

from sluice_export.errors import InputError
from sluice_export.torch.arguments import FORWARD_ERRORS


def parse_input(description: str) -> tuple[str, Tensor]:
    """The name and the tensor that "x:float32:1,10,8" describes. Raises InputError."""
    name, _, rest = description.partition(":")
    type_name, _, sizes = rest.partition(":")
    dtype = getattr(torch, type_name, None)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", sizes) or not isinstance(dtype, torch.dtype):
        raise InputError(
            f"{description!r} is not NAME:TYPE:SHAPE, such as x:float32:1,10,8 (batch and time "
            "are part of the shape)"
        )
    return name, torch.zeros([int(size) for size in sizes.split(",")], dtype=dtype)


def guess_inputs(module: nn.Module) -> Tensor:
    """An input that `module` accepts, guessed from its layers: [2, 5] or [2, 5, features].

    Raises InputError when no guess is accepted.
    """
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    tried: list[Tensor] = []
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            tried.append(torch.zeros(2, 5, dtype=torch.int64))
        elif isinstance(layer, nn.Linear):
            tried.append(torch.zeros(2, 5, layer.in_features, dtype=dtype))
        elif isinstance(layer, nn.Conv1d):
            tried.append(torch.zeros(2, 5, layer.in_channels, dtype=dtype))
        elif isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            tried.append(torch.zeros(2, 5, layer.input_size, dtype=dtype))
    for example in tried:
        try:
            with torch.no_grad():
                module(example)
        except FORWARD_ERRORS:
            continue
        return example
    raise InputError(
        f"the inputs of {type(module).__name__}.forward cannot be guessed; describe "
        "each argument, in order, such as --input x:float32:2,5,8 (name, type, and a shape that "
        "forward accepts, batch and time included)"
    )
