"""Speaks the Open Inference Protocol with our own stubs; every wait has an end."""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import numpy as np

from sluice_protos.open_inference_pb2 import (
    InferParameter,
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
)
from sluice_protos.open_inference_pb2_grpc import GRPCInferenceServiceStub

SECONDS = 60


def parameter(value: Any) -> InferParameter:
    """A value as the protocol's clients send it."""
    if isinstance(value, InferParameter):
        return value
    if isinstance(value, bool):
        return InferParameter(bool_param=value)
    if isinstance(value, int):
        return InferParameter(int64_param=value)
    if isinstance(value, float):
        return InferParameter(double_param=value)
    return InferParameter(string_param=value)


def request(
    values: Any, *, label: str = "", model: str = "accumulator", **parameters: Any
) -> ModelInferRequest:
    """A request to the accumulator: an array [1, 1], [1, steps, 1] …, or one number."""
    x = np.array(values, np.float32)
    x = x.reshape(1, 1) if not x.ndim else x
    return ModelInferRequest(
        model_name=model,
        id=label,
        inputs=[{"name": "x", "datatype": "FP32", "shape": x.shape}],
        raw_input_contents=[x.tobytes()],
        parameters={key: parameter(value) for key, value in parameters.items()},
    )


def values(response: ModelInferResponse) -> list[float]:
    """The first output's numbers, one after another."""
    return np.frombuffer(response.raw_output_contents[0], "<f4").tolist()


class Caller:
    """One client."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = GRPCInferenceServiceStub(channel)

    async def send(self, message: ModelInferRequest) -> ModelInferResponse:
        return await self.stub.ModelInfer(message, timeout=SECONDS)

    async def infer(self, numbers: Any, **fields: Any) -> list[float]:
        """What one request to the accumulator gives."""
        return values(await self.send(request(numbers, **fields)))

    async def fails(self, message: ModelInferRequest) -> tuple[grpc.StatusCode, str]:
        """How a request that must fail does so."""
        try:
            await self.send(message)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        raise AssertionError("it worked")

    def stream(self, **options: Any) -> "Conversation":
        return Conversation(self.stub.ModelStreamInfer(timeout=SECONDS, **options))


class Conversation:
    """One stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def send(self, *messages: ModelInferRequest) -> None:
        for message in messages:
            await self.call.write(message)

    async def read(self) -> ModelStreamInferResponse:
        async with asyncio.timeout(SECONDS):
            response = await self.call.read()
        assert isinstance(response, ModelStreamInferResponse), await self.call.details()
        return response

    async def take(self, count: int) -> list[list[float]]:
        """The numbers of the next answers, none of which may be an error."""
        responses = [await self.read() for _ in range(count)]
        assert not any(response.error_message for response in responses), responses
        return [values(response.infer_response) for response in responses]

    async def ask(self, messages: Iterable[ModelInferRequest]) -> list[list[float]]:
        """Send all, then take an answer for each."""
        sent = list(messages)
        await self.send(*sent)
        return await self.take(len(sent))
