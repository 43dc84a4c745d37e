"""Finds convolutions over time, and refuses those that need more than earlier steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sluice_export.errors import ConvolutionError
from sluice_export.torch.layers import RecurrentLayer


@dataclass(frozen=True)
class CausalConvolution:
    """An nn.Conv1d over time whose output at a step depends on that step and some before."""

    path: str
    module: nn.Conv1d
    # What the module puts in front of its input, [channels, steps]; the rest is zeros.
    padding: Tensor
    # How many outputs it returns beyond the last step.
    surplus: int

    @property
    def name(self) -> str:
        """What contracts and messages call it."""
        return self.path or "conv"

    def within(self, copy: nn.Module) -> "CausalConvolution":
        """The same convolution of a copy of the module that it was found in."""
        module = copy.get_submodule(self.path)
        assert isinstance(module, nn.Conv1d)
        return replace(self, module=module)

    @property
    def width(self) -> int:
        """How many earlier steps it looks back to."""
        return _width(self.module)

    @property
    def channels(self) -> int:
        """The values of one step."""
        return self.module.in_channels

    @property
    def part(self) -> str:
        """What its part of the packed state is called."""
        return f"{self.name}.context"

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Its state part and the shape of that."""
        return {self.part: (self.channels, self.width)}

    @property
    def initial(self) -> Tensor:
        """The context before the first step, [channels, width]."""
        zeros = self.padding.new_zeros(self.channels, self.width - self.padding.shape[1])
        return torch.cat([zeros, self.padding], dim=1)

    def context(self, given: Tensor) -> Tensor:
        """The context after an input of [batch, channels, padding + steps]."""
        zeros = given.new_zeros(*given.shape[:2], self.width)
        return torch.cat([zeros, given], dim=2)[..., -self.width :]


# What carries a state from step to step.
StatefulLayer = RecurrentLayer | CausalConvolution


@dataclass(frozen=True)
class ConvolutionCall:
    """The input and the result of one nn.Conv1d in one call of the module: [batch, channels, …]."""

    module: nn.Conv1d
    given: Tensor
    result: Tensor


def find_convolutions(
    module: nn.Module,
    calls: Sequence[Sequence[ConvolutionCall]],
    sizes: Sequence[tuple[int, int]],
) -> list[CausalConvolution]:
    """The convolutions over time among those called in two calls of `module` with `sizes`.

    Raises ConvolutionError for one that is not causal, and for one that is not called exactly
    once over whole sequences.
    """
    found = []
    for path, child in module.named_modules():
        if not isinstance(child, nn.Conv1d) or not _width(child):
            continue
        small, large = ([call for call in seen if call.module is child] for seen in calls)
        # In a convolution over time the last axis of the input grows with the steps.
        growth = sizes[1][1] - sizes[0][1]
        if not small or large[0].given.shape[-1] - small[0].given.shape[-1] != growth:
            continue
        if len(small) > 1:
            raise ConvolutionError(
                f"{path} is called {len(small)} times in one forward, but has one context to "
                "carry; call it once over the whole sequence, or give each call its own"
            )
        found.append(_check(path, small[0], large[0], sizes))
    return found


def _width(module: nn.Conv1d) -> int:
    return int(module.dilation[0] * (module.kernel_size[0] - 1))


def _check(
    path: str, small: ConvolutionCall, large: ConvolutionCall, sizes: Sequence[tuple[int, int]]
) -> CausalConvolution:
    name, module, inputs = path or "the convolution", small.module, (small.given, large.given)
    (batch, steps), _ = sizes
    if [x.shape[0] if x.dim() == 3 else 0 for x in inputs] != [size[0] for size in sizes]:
        raise ConvolutionError(
            f"{name} is given {list(small.given.shape)} for {batch} sequences of {steps} steps; "
            "each sequence must reach it as one row, [batch, channels, steps]"
        )
    if module.stride[0] != 1:
        raise ConvolutionError(
            f"{name} has stride {module.stride[0]} along time: a stream gives an output at every "
            "step; make its stride part of a step, so that one step has several frames of features"
        )
    width, outer = _width(module), small.given.shape[-1] - steps
    front = torch.cat([x[..., :outer] for x in inputs])
    is_filled = torch.equal(front, front[:1].expand_as(front))
    if not is_filled or not _is_padded_in_front(module, width - outer):
        raise ConvolutionError(
            f"{name} looks at steps to come: with kernel_size={module.kernel_size[0]} and "
            f"dilation={module.dilation[0]} it must be padded by {width} steps in front and by "
            f"none behind. Train it causal: padding=0, and functional.pad(x, ({width}, 0)) before"
        )
    return CausalConvolution(path, module, front[0], small.result.shape[-1] - steps)


def _is_padded_in_front(module: nn.Conv1d, missing: int) -> bool:
    """Whether a convolution itself puts `missing` zeros in front of its input.

    A convolution with a forward of its own may do so: what it computes is proven later.
    """
    if type(module).forward is not nn.Conv1d.forward:
        return missing >= 0
    padding = 0 if module.padding == "valid" else module.padding[0]
    return padding == missing and (missing == 0 or module.padding_mode == "zeros")
