"""Reads, writes and checks the contract inside an exported ONNX file."""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from numpy.typing import NDArray

from sluice_model.errors import ContractError, NotAModelError
from sluice_model.messages import ModelProto, TensorProto, ValueInfoProto
from sluice_protos.contract_pb2 import ModelContract, StatePart, TensorSpec
from sluice_protos.datatypes import DTYPES

METADATA_KEY: Final = "sluice.contract"
SCHEMA_VERSION: Final = 1

# The largest allowed minimum. No kernel needs more, and every run is padded up to the minimum.
_MINIMUM_MAX: Final = 64

# Raises ContractError with the given problem if the given condition does not hold.
_Require = Callable[[bool, str], None]

_ELEMENT_TYPES: Final[dict[int, str]] = {
    TensorProto.BOOL: "BOOL",
    TensorProto.INT8: "INT8",
    TensorProto.INT16: "INT16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8",
    TensorProto.UINT16: "UINT16",
    TensorProto.UINT32: "UINT32",
    TensorProto.UINT64: "UINT64",
    TensorProto.FLOAT16: "FP16",
    TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP64",
}


def load_proto(path: Path) -> ModelProto:
    """Parse an ONNX file that contains all of its weights.

    Raises NotAModelError if it is missing, is not ONNX, or has weights in other files.
    """
    proto = parse_proto(path)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in _tensors(proto)):
        raise NotAModelError(
            f"{path}: keeps weights in other files; save it as one file "
            "(onnx.save_model with save_as_external_data=False)"
        )
    return proto


def parse_proto(path: Path) -> ModelProto:
    """Parse an ONNX file without reading the weights that it has in other files.

    Raises NotAModelError if it is missing or is not ONNX.
    """
    try:
        proto = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise NotAModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # DecodeError of protobuf, or any other error of parsing
        raise NotAModelError(
            f"{path}: is not an ONNX file; `sluice export` writes one from a PyTorch module"
        ) from error
    if not proto.graph.node:
        raise NotAModelError(
            f"{path}: is not an ONNX file, or has an empty graph; "
            "`sluice export` writes one from a PyTorch module"
        )
    return proto


def compute_digest(proto: ModelProto) -> str:
    """SHA-256, in hex, of graph and weights, without metadata, doc strings and producer."""
    bare = ModelProto()
    bare.CopyFrom(proto)
    del bare.metadata_props[:]
    for field in ("doc_string", "producer_name", "producer_version", "domain", "model_version"):
        bare.ClearField(field)
    bare.graph.ClearField("doc_string")
    for node in bare.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    for value in (*bare.graph.input, *bare.graph.output, *bare.graph.value_info):
        value.ClearField("doc_string")
        del value.metadata_props[:]
    del bare.graph.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def write_contract(proto: ModelProto, contract: ModelContract) -> None:
    """Put `contract` into `proto`, with the schema version and the digest filled in.

    Raises ContractError if the contract does not describe the graph.
    """
    contract.schema_version = SCHEMA_VERSION
    contract.digest = compute_digest(proto)
    _check(proto, contract, name=contract.name or "the model")
    text = json_format.MessageToJson(contract, preserving_proto_field_name=True, indent=None)
    kept = [entry for entry in proto.metadata_props if entry.key != METADATA_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props.add(key=METADATA_KEY, value=text)


def read_contract(path: Path) -> ModelContract:
    """The contract inside the file at `path`, checked against its graph and weights.

    Raises NotAModelError or ContractError; both name the fix.
    """
    return parse_contract(load_proto(path), name=str(path))


def parse_contract(proto: ModelProto, *, name: str) -> ModelContract:
    """The contract inside `proto`, checked. Errors call the file `name`."""
    texts = [entry.value for entry in proto.metadata_props if entry.key == METADATA_KEY]
    if not texts:
        raise ContractError(
            f"{name}: has no Sluice contract; make one with `sluice export --onnx {name} --output "
            "served.onnx`, or of a PyTorch module with `sluice export package.module:factory "
            "--output model.onnx`"
        )
    try:
        contract = json_format.Parse(texts[0], ModelContract())
    except json_format.ParseError as error:
        raise ContractError(
            f"{name}: its contract cannot be read ({error}); export it again"
        ) from error
    if contract.schema_version != SCHEMA_VERSION:
        raise ContractError(
            f"{name}: its contract has schema version {contract.schema_version}, this Sluice "
            f"reads version {SCHEMA_VERSION}; export it with this version of Sluice"
        )
    digest = compute_digest(proto)
    if contract.digest != digest:
        raise ContractError(
            f"{name}: graph or weights were changed after the export (contract "
            f"{contract.digest[:12]}, file {digest[:12]}); export it again"
        )
    _check(proto, contract, name=name)
    return contract


def initial_row(contract: ModelContract) -> NDArray[np.float32]:
    """The packed state before the first step: [state_size] float32."""
    row = np.zeros(contract.state_size, np.float32)
    for part in contract.state:
        if part.initial:
            row[part.offset : part.offset + part_size(part)] = part.initial
    return row


def count_parameters(proto: ModelProto) -> int:
    """The number of floats in a graph's weights."""
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}
    return sum(
        math.prod(tensor.dims) for tensor in proto.graph.initializer if tensor.data_type in floats
    )


def part_size(part: StatePart) -> int:
    """The number of floats in one part of the state."""
    return math.prod(part.shape)


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor inside, also those in the branches of nodes and in functions."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if isinstance(value, Message) else value:
            if isinstance(part, TensorProto):
                yield part
            else:
                yield from _tensors(part)


def _check(proto: ModelProto, contract: ModelContract, *, name: str) -> None:
    """Raise ContractError unless names, types and state layout match the graph."""

    def require(is_true: bool, problem: str) -> None:
        if not is_true:
            raise ContractError(f"{name}: the contract {problem}; export it again")

    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name: value for value in proto.graph.input if value.name not in initializers}
    outputs = {value.name: value for value in proto.graph.output}

    require(bool(contract.inputs), "names no input")
    require(bool(contract.outputs), "names no output")
    for specs in (contract.inputs, contract.outputs):
        names = [spec.name for spec in specs]
        require(len(set(names)) == len(names), f"names one of {names} twice")
    expected = {spec.name for spec in contract.inputs}
    expected |= {contract.state_input, contract.lengths_input} - {""}
    require(expected == set(inputs), f"names inputs {sorted(expected)}, not {sorted(inputs)}")
    expected = {spec.name for spec in contract.outputs} | ({contract.state_output} - {""})
    require(expected <= set(outputs), f"names outputs {sorted(expected)}, not {sorted(outputs)}")
    for spec in contract.inputs:
        _check_tensor(inputs[spec.name], spec, contract, require)
    for spec in contract.outputs:
        _check_tensor(outputs[spec.name], spec, contract, require)

    _check_state(inputs, outputs, contract, require)
    for minimum in (contract.batch_min, contract.length_min):
        require(
            1 <= minimum <= _MINIMUM_MAX,
            f"has a smallest batch or length of {minimum}, not of 1 to {_MINIMUM_MAX}",
        )
    require(
        contract.batch_max == 0 or contract.batch_min <= contract.batch_max,
        "has a smallest batch beyond its largest",
    )
    is_padded_by_lengths = bool(contract.lengths_input) or not contract.state_size
    require(
        contract.length_min == 1 or (is_padded_by_lengths and not contract.is_one_step),
        "has a smallest length, but no lengths to tell steps from padding",
    )


def _check_state(
    inputs: dict[str, ValueInfoProto],
    outputs: dict[str, ValueInfoProto],
    contract: ModelContract,
    require: _Require,
) -> None:
    """Check the layout of the state row, and the tensors that carry it through the graph."""
    offset = 0
    for part in contract.state:
        require(part.offset == offset, f"leaves a gap before state part {part.name!r}")
        size = part_size(part)
        is_whole = len(part.initial) in (0, size) and all(map(math.isfinite, part.initial))
        require(is_whole, f"has a wrong initial value for {part.name!r}")
        offset += size
    size = contract.state_size
    require(offset == size, f"has {offset} floats of state parts, not state_size")
    require((size > 0) == bool(contract.state_input), "has a state without input")
    require((size > 0) == bool(contract.state_output), "has a state without output")
    for value in (inputs.get(contract.state_input), outputs.get(contract.state_output)):
        if value is not None:
            tensor = value.type.tensor_type
            sizes = [dim.dim_value for dim in tensor.shape.dim]
            is_row = len(sizes) == 2 and sizes[1] == size
            require(
                is_row and tensor.elem_type == TensorProto.FLOAT,
                f"gives {value.name!r} rows of {size} floats, which the graph does not",
            )
    if contract.lengths_input:
        tensor = inputs[contract.lengths_input].type.tensor_type
        is_counts = tensor.elem_type == TensorProto.INT32 and len(tensor.shape.dim) == 1
        require(is_counts, f"takes {contract.lengths_input!r} for lengths, which are [batch] int32")


def _check_tensor(
    value: ValueInfoProto, spec: TensorSpec, contract: ModelContract, require: _Require
) -> None:
    tensor = value.type.tensor_type
    datatype = _ELEMENT_TYPES.get(tensor.elem_type)
    require(spec.datatype in DTYPES, f"gives {spec.name!r} the unknown datatype {spec.datatype!r}")
    require(spec.datatype == datatype, f"gives {spec.name!r} {spec.datatype}, not {datatype}")
    is_one_step = contract.is_one_step
    axes = {spec.batch_axis} if is_one_step else {spec.batch_axis, spec.time_axis}
    rank = len(tensor.shape.dim)
    is_placed = len(axes) == 2 - is_one_step and max(axes) < rank
    require(is_placed, f"has wrong axes for {spec.name!r}")
    shape = [dim.dim_value for axis, dim in enumerate(tensor.shape.dim) if axis not in axes]
    require(shape == list(spec.shape), f"gives {spec.name!r} shape {list(spec.shape)}, not {shape}")
    require(all(shape), f"gives {spec.name!r} an axis of no fixed size")
    if spec.HasField("valid"):
        dtype = DTYPES[spec.datatype]
        require(dtype.kind in "iu", f"limits the values of {spec.name!r}, which is {spec.datatype}")
        limits = np.iinfo(dtype)
        # The last value may exceed the type: a byte can index a table of more than 256 rows.
        require(
            limits.min <= spec.valid.min <= min(spec.valid.max, limits.max),
            f"has no valid values for {spec.name!r}: {spec.valid.min} to {spec.valid.max}",
        )
