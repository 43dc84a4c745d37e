"""Copies a module for export: on the CPU, in eval mode, in one precision."""

import copy

import torch
from torch import Tensor, nn

from sluice_export.errors import UnsupportedModuleError, notify


def prepare(module: nn.Module) -> nn.Module:
    """A copy of `module` on the CPU in eval mode, in float32 or, where it has any, float64.

    Raises UnsupportedModuleError where it cannot be copied.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if module.training and any(map(_differs_in_training, module.modules())):
        notify(
            "the module is in training mode; it is exported as in eval mode: dropout off, also "
            "between recurrent layers, and batch normalisation by its running statistics"
        )
    # A tensor that weight_norm and the like have computed from weights cannot be copied with its
    # history; forward computes it again.
    computed = {
        id(value): value.detach().clone()
        for child in module.modules()
        for value in vars(child).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        original = copy.deepcopy(module, computed).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModuleError(
            f"the module cannot be copied ({error}); build it afresh, load its state_dict and "
            "export that"
        ) from error
    tensors = (*original.parameters(), *original.buffers())
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        notify("the module computes in float64; it is exported, and proven, in float32")
        return original.double()
    return original.float()


def _differs_in_training(module: nn.Module) -> bool:
    """Whether a module computes something else in training than in eval mode."""
    dropout = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.RNNBase)
    if isinstance(module, dropout):
        return bool(getattr(module, "p", 0) or getattr(module, "dropout", 0))
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
