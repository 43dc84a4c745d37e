"""Finds the batch axis and the time axis of an ONNX file's tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx

from sluice_export.errors import InputError, OutputError
from sluice_export.graphs import inputs_of

BATCH: Final = "batch"
TIME: Final = "steps"
_BATCH_NAMES: Final = ("batch", "batch_size", "n", "b", "bs", "batchsize")
_TIME_NAMES: Final = (
    "time",
    "steps",
    "step",
    "t",
    "seq",
    "sequence",
    "seq_len",
    "length",
    "frames",
)

# An axis: BATCH, TIME, or how large it is.
Axis = str | int
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Layout:
    """What each axis of the inputs and the states is."""

    inputs: dict[str, Axes]
    states: dict[str, Axes]
    # Whether the file takes any number of rows; if not, its batch axes have size 1.
    has_batch: bool = True

    @property
    def has_time(self) -> bool:
        """Whether the file takes any number of steps."""
        return any(TIME in axes for axes in self.inputs.values())

    def shape(self, name: str, batch: int, steps: int) -> list[int]:
        """The shape of an input or state for that many rows and steps."""
        axes = self.inputs.get(name) or self.states[name]
        sizes = {BATCH: batch, TIME: steps}
        return [sizes[axis] if isinstance(axis, str) else axis for axis in axes]


def find_layout(
    graph: onnx.GraphProto, states: Sequence[str], described: Mapping[str, Axes]
) -> Layout:
    """What each axis of the inputs and `states` is; the user has named those `described`.

    Raises InputError for an axis that is unclear.
    """
    values = inputs_of(graph)
    unknown = described.keys() - values.keys() - set(states)
    if unknown:
        raise InputError(f"--input names {sorted(unknown)}, but the inputs are {', '.join(values)}")
    roles: dict[str, Axis] = {}
    for name, axes in described.items():
        _note_roles(next(v for v in graph.input if v.name == name), axes, roles)
    held = {value.name: value for value in graph.input}
    found = {name: _state_axes(held[name], described.get(name), roles) for name in states}
    data = {
        name: described.get(name) or _input_axes(value, roles, has_states=bool(states))
        for name, value in values.items()
        if name not in states
    }
    if not any(BATCH in axes for axes in data.values()):
        return Layout({n: with_batch(n, axes) for n, axes in data.items()}, found, has_batch=False)
    layout = Layout(data, found)
    for name, axes in found.items():
        if BATCH not in axes:
            raise InputError(
                f"state {name!r} has no batch axis, though inputs have; name it: "
                f"--input {name}:batch,{','.join(map(str, axes[1:]))} or so"
            )
    for name, axes in data.items():
        if BATCH not in axes:
            raise InputError(
                f"input {name!r} has no batch axis, so all sequences of a run would share it; fix "
                f"it to one value: --set {name}=…"
            )
        if layout.has_time and TIME not in axes:
            raise InputError(
                f"input {name!r} has no time axis, though others have; every step carries all its "
                "inputs. Give it one, or fix it to one value: --set"
            )
    return layout


def declare_axes(
    values: Iterable[onnx.ValueInfoProto], known: Mapping[str, Axes], *, has_batch: bool
) -> None:
    """Write the `known` axes of inputs or outputs into the graph."""
    for value in values:
        if value.name in known:
            kind = value.type.tensor_type.elem_type
            dims = [1 if axis == BATCH and not has_batch else axis for axis in known[value.name]]
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, dims))


def with_batch(name: str, axes: Axes) -> Axes:
    """The axes of a tensor with one row: the first axis of size 1 is its batch axis."""
    if 1 not in axes:
        raise InputError(
            f"{name!r} has axes {list(axes)}, none of size 1 that could be its batch axis; give "
            "it one ([1, …]) when the file is made"
        )
    place = axes.index(1)
    return (*axes[:place], BATCH, *axes[place + 1 :])


def _note_roles(value: onnx.ValueInfoProto, axes: Axes, roles: dict[str, Axis]) -> None:
    """Record which role `axes` gives to each symbol in a value's shape."""
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(axes):
        raise InputError(
            f"--input {value.name}: it has {len(dims)} axes, not {len(axes)}; name each: "
            f"{value.name}:batch,time,80 or so"
        )
    for dim, axis in zip(dims, axes, strict=True):
        if dim.dim_param:
            roles[dim.dim_param] = axis


def _state_axes(value: onnx.ValueInfoProto, described: Axes | None, roles: dict[str, Axis]) -> Axes:
    """A state's axes: at most one may be of any size, and is the batch axis."""
    if described:
        return described
    dims = value.type.tensor_type.shape.dim
    axes = [roles.get(dim.dim_param, dim.dim_param) or dim.dim_value or "" for dim in dims]
    free = [place for place, axis in enumerate(axes) if isinstance(axis, str) and axis != BATCH]
    if len(free) > 1 or (free and BATCH in axes):
        names = [dim.dim_param or "?" for dim in dims]
        raise InputError(
            f"state {value.name!r} has several axes of any size ({names}): a cache that grows with "
            "the past (as of attention) cannot be carried as a state of fixed size. Where it does "
            f"not grow, give its sizes: --input {value.name}:batch,…"
        )
    if free:
        symbol = dims[free[0]].dim_param
        axes[free[0]] = BATCH
        if symbol:
            roles[symbol] = BATCH
    return tuple(axes)


def _input_axes(value: onnx.ValueInfoProto, roles: dict[str, Axis], *, has_states: bool) -> Axes:
    dims = value.type.tensor_type.shape.dim
    axes: list[Axis] = [
        roles.get(dim.dim_param) or _by_name(dim.dim_param) or dim.dim_value or "" for dim in dims
    ]
    free = [place for place, axis in enumerate(axes) if axis == ""]
    is_batch_known = BATCH in axes
    if len(free) == 1 and dims[free[0]].dim_param and is_batch_known and TIME not in axes:
        axes[free[0]] = TIME
    elif len(free) == 1 and not is_batch_known and TIME not in axes and has_states:
        is_batch_fixed = BATCH not in roles.values()
        axes[free[0]] = TIME if is_batch_fixed and dims[free[0]].dim_param else BATCH
    elif free:
        shown = ",".join(dim.dim_param or str(dim.dim_value or "?") for dim in dims)
        raise InputError(
            f"which axes of input {value.name!r} ({shown}) are batch and time is unclear; "
            f"name them: --input {value.name}:batch,time,80 (with the sizes of all others), or "
            f"{value.name}:batch,512 where one run takes one frame of 512 values"
        )
    for dim, axis in zip(dims, axes, strict=True):
        if dim.dim_param:
            roles[dim.dim_param] = axis
    return tuple(axes)


def _by_name(symbol: str) -> Axis | None:
    """The role of a symbol by its name."""
    if symbol.lower() in _BATCH_NAMES:
        return BATCH
    return TIME if symbol.lower() in _TIME_NAMES else None


def find_output_axes(
    name: str,
    small: Sequence[int],
    large: Sequence[int],
    *,
    batches: tuple[int, int] | None,
    steps: tuple[int, int] | None,
) -> Axes:
    """The axes of an output, from its shapes in two runs of different sizes.

    `batches` and `steps` are the sizes of those runs; None: not variable. Raises OutputError
    where the shapes do not grow with them.
    """
    roles = {sizes: role for sizes, role in ((batches, BATCH), (steps, TIME)) if sizes}
    axes: list[Axis] = []
    for pair in zip(small, large, strict=True):
        if pair[0] != pair[1] and pair not in roles:
            raise OutputError(
                f"output {name!r} has shapes {list(small)} and {list(large)} in two runs, so it "
                "does not have one row for every step; where one run takes one frame, name its "
                "size: "
                "--input x:batch,512"
            )
        axes.append(roles[pair] if pair[0] != pair[1] else pair[0])
    if batches is None:
        axes = list(with_batch(name, tuple(axes)))
    for role in roles.values():
        if axes.count(role) != 1:
            raise OutputError(
                f"output {name!r} has shape {list(small)}, without a {role} axis: a stream "
                "returns an output for every step of every sequence"
            )
    return tuple(axes)
