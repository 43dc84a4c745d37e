"""Serves a plain asyncio gRPC echo, which shows what a message costs without any work.

`python -m bench.echo REPLY_BYTES [MODEL]` answers every message of a stream with that many
bytes. With a model, it also runs the bare model once per message. The run then happens after a
wait, as in a server, and not in a hot loop. It imports nothing of Sluice but bench.bare.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from bench.bare import load, make_run


def make_handler(
    reply: bytes, run: Callable[[], None] | None
) -> "grpc.GenericRpcHandler[Any, Any]":
    """A handler of /echo.Echo/Infer."""

    async def infer(messages: AsyncIterator[bytes], context: Any) -> None:
        async for _ in messages:
            if run is not None:
                run()
            await context.write(reply)

    return grpc.method_handlers_generic_handler(
        "echo.Echo", {"Infer": grpc.stream_stream_rpc_method_handler(infer)}
    )


async def serve(reply_bytes: int, model: str | None) -> None:
    """Serve until the process is ended."""
    run = make_run(load(model), 1) if model else None
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((make_handler(bytes(reply_bytes), run),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "ready", "listen": f"127.0.0.1:{port}"}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
