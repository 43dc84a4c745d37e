"""Reads messages of the Open Inference Protocol into requests, and writes their answers."""

from typing import Any

from google.protobuf.message import DecodeError

from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.open_inference_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from sluice_service.arrays import Array
from sluice_service.batching.inputs import STEPS_MAX
from sluice_service.errors import InvalidInputError, RequestError
from sluice_service.rpc.open_inference.requests import InferRequest
from sluice_service.rpc.open_inference.tensors import TensorFormat

OutputTensor = ModelInferResponse.InferOutputTensor

_FINAL_RESPONSE = "triton_enable_empty_final_response"
_RESERVED = "triton_"
# The field of a parameter for each kind of value.
_BOOLEAN = ("bool_param",)
_INTEGERS = ("int64_param", "uint64_param")
_NO_VALUE = "without a value"


def parse(data: bytes) -> ModelInferRequest:
    """A message from its bytes. Raises RequestError."""
    try:
        return ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise RequestError(
            "a message that is not an inference.ModelInferRequest (truncated, or of another call)"
        ) from error


class ModelFormat:
    """Reads the messages of one model and writes its answers; its tensors are looked up once."""

    def __init__(self, name: str, contract: ModelContract, *, batch_max: int) -> None:
        self._name = name
        self._batch_max = batch_max
        self._inputs = [TensorFormat(spec) for spec in contract.inputs]
        self._outputs = [TensorFormat(spec) for spec in contract.outputs]
        self._input_names = [tensor.name for tensor in self._inputs]
        self._all_outputs = tuple(range(len(self._outputs)))
        self._output_numbers = {tensor.name: i for i, tensor in enumerate(self._outputs)}

    def read(self, message: ModelInferRequest, request: InferRequest) -> None:
        """Fill in a request from its message, without copying the inputs.

        Raises RequestError or InvalidInputError, which name what was expected.
        """
        request.version = message.model_version
        if message.parameters:
            _read_parameters(message.parameters, request)
        self._read_inputs(message, request)
        request.wanted = self._read_outputs(message) if message.outputs else self._all_outputs

    def write(self, request: InferRequest) -> ModelInferResponse:
        """The answer to a request that succeeded."""
        lead = [request.batch, request.steps] if request.has_time else [request.batch]
        tensors = self._outputs
        response = ModelInferResponse(
            model_name=self._name,
            model_version=request.version,
            id=request.id,
            outputs=[
                OutputTensor(
                    name=tensors[i].name,
                    datatype=tensors[i].datatype,
                    shape=[*lead, *tensors[i].shape],
                )
                for i in request.wanted
            ],
            raw_output_contents=[request.outputs[i] for i in request.wanted],
        )
        if request.wants_final_flag:
            response.parameters["triton_final_response"].bool_param = True
        return response

    def _read_inputs(self, message: ModelInferRequest, request: InferRequest) -> None:
        sent = message.inputs
        if len(sent) != len(self._inputs):
            raise self._wrong_inputs(message)
        raw = message.raw_input_contents
        if raw and len(raw) != len(sent):
            raise InvalidInputError(
                f"{len(raw)} raw_input_contents for {len(sent)} inputs; give one for each"
            )
        shape: tuple[int, int, bool] | None = None
        arrays: list[Array] = []
        by_name = {tensor.name: index for index, tensor in enumerate(sent)}
        for rule in self._inputs:
            index = by_name.get(rule.name, -1)
            if index < 0:
                raise self._wrong_inputs(message)
            tensor = sent[index]
            this = rule.read_shape(tensor)
            if shape is not None and this != shape:
                raise InvalidInputError(
                    "the inputs differ in batch or steps; all must have the same"
                )
            shape = this
            arrays.append(rule.read(tensor, raw[index] if raw else None, this[0] * this[1]))
        assert shape is not None
        request.batch, request.steps, request.has_time = shape
        request.inputs = arrays
        if request.batch > self._batch_max:
            raise InvalidInputError(
                f"a batch of {request.batch}; model {self._name!r} takes {self._batch_max} at most"
            )
        if request.sequence_id and request.batch != 1:
            raise InvalidInputError(
                f"a batch of {request.batch} with a sequence id: a sequence is one row; send each "
                "sequence by itself, and its steps as [1, steps, …]"
            )

    def _wrong_inputs(self, message: ModelInferRequest) -> InvalidInputError:
        names = [tensor.name for tensor in message.inputs]
        return InvalidInputError(
            f"inputs {names} were sent; model {self._name!r} takes {self._input_names}, each once"
        )

    def _read_outputs(self, message: ModelInferRequest) -> tuple[int, ...]:
        """The requested outputs, each once even if it is named several times."""
        numbers = []
        for tensor in message.outputs:
            number = self._output_numbers.get(tensor.name)
            if number is None:
                raise InvalidInputError(
                    f"there is no output {tensor.name!r}; model {self._name!r} has "
                    f"{list(self._output_numbers)}"
                )
            for key in tensor.parameters:
                if key == "classification" or key.startswith("shared_memory"):
                    raise RequestError(
                        f"output {tensor.name!r} asks for {key!r}, which is not served here; "
                        "leave it out and read the values from the answer"
                    )
            numbers.append(number)
        return tuple(dict.fromkeys(numbers))


def _read_parameters(parameters: Any, request: InferRequest) -> None:
    """Fill in the sequence and the flags of a request. Raises RequestError."""
    for key, value in parameters.items():
        if key == "sequence_id":
            request.sequence_id, request.quoted_id = _read_sequence(value)
        elif key == "sequence_start":
            request.is_start = _read_choice(key, value, _BOOLEAN)
        elif key == "sequence_end":
            request.is_end = _read_choice(key, value, _BOOLEAN)
        elif key == "sequence_step":
            request.first_step = _read_step(value)
        elif key == "timeout":
            request.timeout_seconds = _read_timeout(value)
        elif key == _FINAL_RESPONSE:
            request.wants_final_flag = _read_choice(key, value, _BOOLEAN)
        elif key.startswith(_RESERVED):
            raise RequestError(
                f"parameter {key!r} is unknown, and names that begin with {_RESERVED!r} are "
                "reserved; leave it out or rename it"
            )
    has_flags = request.is_start or request.is_end or request.first_step is not None
    if has_flags and not request.sequence_id:
        raise RequestError(
            "sequence_start, sequence_end and sequence_step belong to a sequence; name it with "
            'the parameter sequence_id, other than 0 or ""'
        )
    if request.is_start and request.first_step:
        raise RequestError(
            f"sequence_start with sequence_step {request.first_step}: a sequence starts at step 0"
        )


def _read_sequence(value: InferParameter) -> tuple[str, str]:
    """The sequence id as the host knows it, and as messages quote it: 1 is not "1"."""
    kind = value.WhichOneof("parameter_choice")
    if kind == "string_param":
        name = value.string_param
        return (f"string:{name}", repr(name)) if name else ("", "")
    if kind in _INTEGERS:
        number = getattr(value, kind)
        return (f"int64:{number}", str(number)) if number else ("", "")
    raise RequestError(f"sequence_id is {kind or _NO_VALUE}; send int64_param or string_param")


def _read_step(value: InferParameter) -> int:
    step: int = _read_choice("sequence_step", value, _INTEGERS)
    if not 0 <= step <= STEPS_MAX:
        raise RequestError(f"sequence_step is {step}; it counts steps from 0")
    return step


def _read_timeout(value: InferParameter) -> float | None:
    """Seconds; None if the client leaves it to the server."""
    microseconds: int = _read_choice("timeout", value, _INTEGERS)
    if microseconds < 0:
        raise RequestError(f"timeout is {microseconds}; it counts microseconds, and 0 is none")
    return microseconds / 1e6 or None


def _read_choice(key: str, value: InferParameter, kinds: tuple[str, ...]) -> Any:
    """The value of a parameter that must be of one of these kinds. Raises RequestError."""
    kind = value.WhichOneof("parameter_choice")
    if kind not in kinds:
        raise RequestError(f"{key} is {kind or _NO_VALUE}; send {kinds[0]}")
    return getattr(value, kind)
