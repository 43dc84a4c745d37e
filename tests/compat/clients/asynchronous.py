"""The field's asyncio client: single requests side by side, and a stream of them."""

import asyncio
import sys

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

COUNT = 20


def tensor(value: int) -> InferInput:
    tensor = InferInput("INPUT", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[value]], np.int32))
    return tensor


async def run_sequence(client: InferenceServerClient, sequence: int) -> None:
    total = 0
    for index in range(5):
        total += sequence + index
        answer = await client.infer(
            "integers",
            [tensor(sequence + index)],
            sequence_id=sequence,
            sequence_start=index == 0,
            sequence_end=index == 4,
        )
        assert answer.as_numpy("OUTPUT").tolist() == [[total]]


async def run_stream(client: InferenceServerClient) -> None:
    async def requests():
        for index in range(COUNT):
            yield {
                "model_name": "integers",
                "inputs": [tensor(index)],
                "request_id": str(index),
                "sequence_id": "of a stream",
                "sequence_start": index == 0,
                "sequence_end": index == COUNT - 1,
            }

    index = total = 0
    async for answer, error in client.stream_infer(requests()):
        assert error is None, error
        total += index
        assert answer.get_response().id == str(index)
        assert answer.as_numpy("OUTPUT").tolist() == [[total]]
        index += 1
    assert index == COUNT


async def main() -> None:
    async with InferenceServerClient(sys.argv[1]) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("integers")).name == "integers"
        await asyncio.gather(*(run_sequence(client, 3000 + number) for number in range(COUNT)))
        await run_stream(client)


asyncio.run(main())
print("done")
