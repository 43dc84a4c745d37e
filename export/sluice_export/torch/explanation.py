"""Names the first operation of a module that needs more than one step and the carried state.

What `proof.explanation` is for graphs, for modules that are traced one step at a time.
"""

import linecache
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sluice_export.proof.comparison import measure_difference
from sluice_export.proof.evidence import Evidence
from sluice_export.source_lines import describe_line, is_user_file
from sluice_export.torch.analysis import Analysis
from sluice_export.torch.convolutions import CausalConvolution, StatefulLayer
from sluice_export.torch.layers import LSTM, RecurrentLayer
from sluice_export.torch.recording import LayerCall, Recording, record_call


@dataclass(frozen=True)
class _Place:
    """An operation in the user's source."""

    operation: str
    file: str
    line: int

    def __str__(self) -> str:
        code = linecache.getline(self.file, self.line).strip()
        return describe_line(self.operation, self.file, self.line, code)


@dataclass
class _LastValues(TorchFunctionMode):
    """Keeps the last value of every operation in the user's source, in order."""

    values: dict[_Place, Tensor] = field(default_factory=dict)
    is_paused: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep what `func` returns."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor) and not self.is_paused and name not in {"__get__", "__set__"}:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and not is_user_file(frame.f_code.co_filename):
                frame = frame.f_back
            if frame is not None:
                place = _Place(name.strip("_"), frame.f_code.co_filename, frame.f_lineno)
                self.values[place] = result.detach()
        return result


def explain_step(module: nn.Module, analysis: Analysis, evidence: Evidence) -> str:
    """Which operation of `module` needs more than one step and the carried state: a sentence.

    The module is run on a whole sequence, and on its last step alone from the state before it.
    The last value of every operation must be the same in both.
    """
    signature = analysis.signature
    inputs = signature.to_tensors(evidence.inputs)
    beginning = [tensor[:, :-1] for tensor in inputs]
    begun = record_call(signature.call, module, analysis.layers, beginning)
    with _LastValues() as whole:
        record_call(signature.call, module, (), inputs)
    step = [tensor[-1:, -1:] for tensor in inputs]
    alone = _LastValues()
    with _continue(analysis.stateful_layers, begun, alone), alone:
        record_call(signature.call, module, (), step)
    for place, value in alone.values.items():
        if place in whole.values and _differs(value, whole.values[place], evidence.tolerance):
            return (
                "Each step must follow from its own inputs and from the state that layers carry. "
                f"The first value that does not comes from {place}"
            )
    altered = [layer for layer in analysis.layers if layer.is_altered]
    if altered:
        return (
            f"{altered[0].name} is a {type(altered[0].module).__name__} with a forward of its own, "
            f"but the graph has that of {altered[0].kind.operator} alone; change its output "
            "outside of it, and leave the state as the cell returns it"
        )
    hidden = [f"the c of {layer.name}" for layer in analysis.layers if layer.kind is LSTM]
    hidden += [
        f"what {convolution.name} gives beyond the last step"
        for convolution in analysis.convolutions
        if convolution.surplus
    ]
    return (
        "Each step follows from the one before, so an output must read what is not known at "
        f"every step: {' or '.join(hidden) or 'something that changes from call to call'}"
    )


def _differs(one: Tensor, whole: Tensor, tolerance: float) -> bool:
    """Whether the last row and step of a value differs from the same row and step alone."""
    if one.dim() != whole.dim():
        return True
    for axis, (short, long) in enumerate(zip(one.shape, whole.shape, strict=True)):
        if short != long and short and long:
            one, whole = one.narrow(axis, short - 1, 1), whole.narrow(axis, long - 1, 1)
    return not measure_difference(one.numpy(), whole.numpy()) <= tolerance


@contextmanager
def _continue(
    layers: Sequence[StatefulLayer], begun: Recording, values: _LastValues
) -> Iterator[None]:
    """Make stateful layers continue from the last row of `begun` while the block runs.

    The state that the module passes is ignored. `values` inside the layers are not kept.
    """

    def pause(*_: object) -> None:
        values.is_paused = True

    def resume(*_: object) -> None:
        values.is_paused = False

    handles = []
    for layer in layers:
        handles.append(layer.module.register_forward_pre_hook(pause))
        if isinstance(layer, CausalConvolution):
            hook = _continue_convolution(layer, begun.context(layer)[-1:])
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        else:
            hook = _continue_layer(layer, begun.last_calls(layer))
            handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        handles.append(layer.module.register_forward_hook(resume))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _continue_layer(layer: RecurrentLayer, calls: Sequence[LayerCall]) -> Callable[..., Any]:
    is_cell = isinstance(layer.module, nn.RNNCellBase)
    waiting = iter(calls)

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = [state[:, -1:] for state in next(waiting).after]
        states = [state[0] for state in states] if is_cell else states
        step = args[0] if args else kwargs["input"]
        return (step, tuple(states) if len(states) > 1 else states[0]), {}

    return give


def _continue_convolution(convolution: CausalConvolution, context: Tensor) -> Callable[..., Any]:
    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Tensor) -> Tensor:
        step = (args[0] if args else kwargs["input"])[..., -1:]
        module = convolution.module
        return functional.conv1d(
            functional.pad(torch.cat([context, step], dim=2), (0, convolution.surplus)),
            module.weight,
            module.bias,
            dilation=module.dilation,
            groups=module.groups,
        )

    return give
