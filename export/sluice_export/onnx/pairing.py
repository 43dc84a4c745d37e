"""Finds the states of an ONNX file: which input takes a state, and which output returns it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx

from sluice_export.errors import PairingError
from sluice_export.graphs import (
    RECURRENT,
    constants_of,
    initial_states_of,
    inputs_of,
    producers_of,
)

# Operations that move values and change none.
_SHAPE_ONLY: Final = frozenset(
    {"Identity", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Flatten", "Slice", "Split"}
    | {"Gather", "Cast"}
)
_BEFORE: Final = r"(^|[_.\-/])(in|input|past|prev|previous|old|init|initial|0)(?=$|[_.\-/])|0$"
_AFTER: Final = (
    r"(^|[_.\-/])(out|output|present|new|next|cur|current|final|last|n|1)(?=$|[_.\-/])|n$|N$"
)

# A state of a recurrent operator: its first output, and "h" or "c".
_Mark = tuple[str, str]


@dataclass(frozen=True)
class StatePair:
    """A state: the input that takes it and the output that returns it."""

    input: str
    output: str
    # The place of the state in an output that stacks several along its first axis.
    index: int | None = None


def pair_states(proto: onnx.ModelProto, chosen: Mapping[str, str]) -> list[StatePair]:
    """The states of a graph, in the order of its inputs.

    They are those `chosen` (input to output, or to "output[index]" of a stack). Where none is,
    they are found by structure, then by name, then by shape. Raises PairingError for a tie.
    """
    graph = proto.graph
    pairs = _pair_chosen(graph, chosen)
    if pairs:
        return pairs
    for rule in (_pair_structure, _pair_names):
        taken = {pair.input for pair in pairs}
        used = {pair.output for pair in pairs}
        pairs += rule(graph, taken, used)
    if not pairs:
        pairs = _pair_shapes(graph)
    order = list(inputs_of(graph))
    if pairs and len(pairs) == len(order):
        raise PairingError(
            f"each input would be a state ({', '.join(order)}), with no data left to stream; "
            f"name the states: --state {pairs[0].input}={pairs[0].output}"
        )
    return sorted(pairs, key=lambda pair: order.index(pair.input))


def could_be_states(graph: onnx.GraphProto, pairs: Sequence[StatePair]) -> list[str]:
    """The inputs read as data although an output has the same type and shape."""
    taken, used = {pair.input for pair in pairs}, {pair.output for pair in pairs}
    outputs = [value for value in graph.output if value.name not in used]
    data = {name: value for name, value in inputs_of(graph).items() if name not in taken}
    shapes = [value.type.SerializeToString(deterministic=True) for value in outputs]
    doubtful = [
        name
        for name, value in data.items()
        if value.type.SerializeToString(deterministic=True) in shapes
    ]
    return doubtful if len(doubtful) < len(data) else []


def _pair_chosen(graph: onnx.GraphProto, chosen: Mapping[str, str]) -> list[StatePair]:
    # Also inputs with a default, which is then the initial state.
    inputs, outputs = ({value.name for value in held} for held in (graph.input, graph.output))
    pairs = []
    for name, target in chosen.items():
        stacked = None if target in outputs else re.fullmatch(r"(.+)\[(\d+)\]", target)
        output = stacked[1] if stacked else target
        if name not in inputs or output not in outputs:
            raise PairingError(
                f"--state {name}={target}: the file's inputs are {', '.join(sorted(inputs))}, its "
                f"outputs {', '.join(sorted(outputs))}"
            )
        pairs.append(StatePair(name, output, int(stacked[2]) if stacked else None))
    tracer = _Tracer(graph)
    before = tracer.inputs()
    for pair in pairs:
        marks = tracer.marks(pair.output)
        if pair.index is None and marks and before.get(pair.input, marks) != marks:
            raise PairingError(
                f"--state {pair.input}={pair.output}: the graph says otherwise: {pair.output!r} is "
                f"not the last value of the state that {pair.input!r} starts"
            )
    return pairs


def _pair_structure(graph: onnx.GraphProto, taken: set[str], used: set[str]) -> list[StatePair]:
    """Inputs and outputs that only moves of values separate from the state of an operator."""
    tracer = _Tracer(graph)
    before = {name: marks for name, marks in tracer.inputs().items() if name not in taken}
    after = {value.name: tracer.marks(value.name) for value in graph.output}
    pairs: list[StatePair] = []
    for name, marks in after.items():
        if not marks or name in used:
            continue
        whole = [source for source, held in before.items() if held == marks]
        parts = [source for source, held in before.items() if held < marks]
        if len(whole) == 1:
            pairs.append(StatePair(whole[0], name))
        elif parts and set().union(*(before[source] for source in parts)) == marks:
            pairs += _unstack(tracer, name, {source: before[source] for source in parts})
    paired = {pair.input for pair in pairs}
    for source, held in before.items():
        apart = [name for name, marks in after.items() if marks and marks < held]
        if source not in paired and apart:
            raise PairingError(
                f"input {source!r} starts the states of several operators, which are returned "
                f"separately, as {', '.join(apart)}; give each operator its own state input, or "
                "stack the returned states into one output in the order of the input"
            )
    return pairs


def _unstack(
    tracer: "_Tracer", output: str, before: Mapping[str, frozenset[_Mark]]
) -> list[StatePair]:
    """The pairs of an output that stacks the states of several inputs."""
    operands = tracer.operands(output)
    pairs = [
        StatePair(source, output, place)
        for place, operand in enumerate(operands)
        for source, marks in before.items()
        if tracer.marks(operand) == marks
    ]
    if len(pairs) != len(before) or len(operands) != len(before):
        raise PairingError(
            f"output {output!r} stacks the states of {', '.join(before)} in an unknown order; name "
            "it: "
            + " ".join(f"--state '{name}={output}[{place}]'" for place, name in enumerate(before))
            + " (in the right order)"
        )
    return pairs


class _Tracer:
    """Follows values back through operations that only move values."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._producers = producers_of(graph)
        self._constants = constants_of(graph)

    def inputs(self) -> dict[str, frozenset[_Mark]]:
        """The states of recurrent operators that each input of the graph starts."""
        found: dict[str, set[_Mark]] = {}
        for node in self._graph.node:
            if node.op_type in RECURRENT:
                for state, name in zip("hc", initial_states_of(node), strict=True):
                    for source in self._sources(name) if name else ():
                        found.setdefault(source, set()).add((node.output[0], state))
        given = inputs_of(self._graph)
        return {name: frozenset(marks) for name, marks in found.items() if name in given}

    def marks(self, name: str) -> frozenset[_Mark]:
        """The states that a value consists of; none where it has other parts."""
        marks = set[_Mark]()
        for source in self._sources(name):
            node = self._producers.get(source)
            if node is None or node.op_type not in RECURRENT:
                return frozenset()
            place = list(node.output).index(source)
            if place == 0:
                return frozenset()
            marks.add((node.output[0], "hc"[place - 1]))
        return frozenset(marks)

    def operands(self, name: str) -> list[str]:
        """The values that a value stacks along its first axis; none where it is no stack."""
        node = self._producers[name]
        while node.op_type == "Identity":
            node = self._producers[node.input[0]]
        is_stack = node.op_type == "Concat" and node.attribute[0].i == 0
        return list(node.input) if is_stack else []

    def _sources(self, name: str) -> set[str]:
        """The values that a value comes from by operations that only move values."""
        node = self._producers.get(name)
        if node is None or node.op_type in RECURRENT:
            return {name}
        if node.op_type == "Concat":
            return set().union(*(self._sources(part) for part in node.input))
        if node.op_type in _SHAPE_ONLY and node.input[0] not in self._constants:
            return self._sources(node.input[0])
        return {name}


def _pair_names(graph: onnx.GraphProto, taken: set[str], used: set[str]) -> list[StatePair]:
    """Inputs and outputs whose names differ only in the word for before or after."""
    inputs = [v for name, v in inputs_of(graph).items() if name not in taken]
    outputs = [value for value in graph.output if value.name not in used]

    def related(one: onnx.ValueInfoProto, two: onnx.ValueInfoProto) -> bool:
        shared = _stems(one.name, _BEFORE) & _stems(two.name, _AFTER)
        return bool(shared) and _fits(one, two)

    return _pair_unique(inputs, outputs, related, "name")


def _pair_shapes(graph: onnx.GraphProto) -> list[StatePair]:
    """Inputs and outputs of the same shape, in a graph without recurrent operators."""
    if any(node.op_type in RECURRENT for node in graph.node):
        return []
    inputs = list(inputs_of(graph).values())
    fitting = [
        value
        for value in inputs
        if any(_fits(value, other) for other in graph.output) and _is_of_fixed_size(value)
    ]
    if not fitting or len(inputs) == 1:
        return []
    if len(fitting) == len(inputs):
        names = ", ".join(value.name for value in fitting)
        raise PairingError(
            f"which of the inputs {names} is the state is unclear: each has the shape of an "
            f"output ({', '.join(v.name for v in graph.output)}); name it: --state input=output"
        )
    return _pair_unique(fitting, list(graph.output), _fits, "shape")


def _pair_unique(
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    is_pair: Callable[[onnx.ValueInfoProto, onnx.ValueInfoProto], bool],
    what: str,
) -> list[StatePair]:
    """The pairs in which each is the other's only partner. Raises PairingError for a tie."""
    pairs = []
    for value in inputs:
        partners = [other for other in outputs if is_pair(value, other)]
        rivals = [one for one in inputs if any(is_pair(one, other) for other in partners)]
        if len(partners) > 1 or len(rivals) > 1:
            raise PairingError(
                f"the state of input {', '.join(one.name for one in rivals)} may come back as "
                f"{', '.join(one.name for one in partners)}: each fits by {what}; name the pair: "
                f"--state {value.name}={partners[0].name}"
            )
        if partners:
            pairs.append(StatePair(value.name, partners[0].name))
    return pairs


def _stems(name: str, marks: str) -> set[str]:
    """A name with and without its word for before or after, in lower case, without separators."""
    bare = re.sub(marks, "", name, flags=re.IGNORECASE)
    return {re.sub(r"[_.\-/]+", "", text).lower() for text in (name, bare)} - {""}


def _is_of_fixed_size(value: onnx.ValueInfoProto) -> bool:
    """Whether at most one axis, which is then that of the batch, has any size."""
    return sum(not dim.dim_value for dim in value.type.tensor_type.shape.dim) <= 1


def _fits(one: onnx.ValueInfoProto, two: onnx.ValueInfoProto) -> bool:
    """Whether two values may have one type and shape; an axis of unknown size fits any."""
    first, second = one.type.tensor_type, two.type.tensor_type
    if first.elem_type != second.elem_type:
        return False
    if not second.HasField("shape"):
        return True
    if len(first.shape.dim) != len(second.shape.dim):
        return False
    sizes = zip(first.shape.dim, second.shape.dim, strict=True)
    return all(a.dim_value == b.dim_value or not a.dim_value or not b.dim_value for a, b in sizes)
