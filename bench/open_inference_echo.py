"""Serves a plain asyncio gRPC echo for both kinds of call of the Open Inference Protocol.

`python -m bench.open_inference_echo REPLY_BYTES` answers every request with that many bytes.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio


def make_handler(reply: bytes) -> "grpc.GenericRpcHandler[Any, Any]":
    """A handler of the two calls under their names in the protocol."""

    async def infer(data: bytes, context: Any) -> bytes:
        return reply

    async def stream(messages: AsyncIterator[bytes], context: Any) -> None:
        async for _ in messages:
            await context.write(reply)

    return grpc.method_handlers_generic_handler(
        "inference.GRPCInferenceService",
        {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream),
        },
    )


async def serve(reply_bytes: int) -> None:
    """Until the process is ended."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((make_handler(bytes(reply_bytes)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "ready", "listen": f"127.0.0.1:{port}"}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
