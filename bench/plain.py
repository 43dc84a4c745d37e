"""Serves ONNX Runtime as people usually do: over gRPC, with one run per message.

`python -m bench.plain MODEL asyncio|threads` has

    /plain.Plain/Stream     one stream per client; the states are in a dict by sequence number
    /plain.Plain/Step       one call per step; the same dict
    /plain.Plain/Stateless  one call per step; the client sends the state and gets the new one

Messages are raw bytes, which is an advantage: the sequence's number (8 bytes) or its state, then
the step. It imports nothing of Sluice but bench.bare.
"""

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import numpy as np

from bench.bare import load

THREADS = 16
NUMBER_BYTES = 8


class Plain:
    """The model, and the states of all sequences."""

    def __init__(self, path: str) -> None:
        self._session = load(path)
        (size,) = (value.shape[1] for value in self._session.get_inputs() if value.name == "state")
        self._state_bytes = 4 * size
        self._names = [value.name for value in self._session.get_outputs()]
        self._lengths = np.ones(1, np.int32)
        self._states: defaultdict[bytes, Any] = defaultdict(lambda: np.zeros((1, size), np.float32))

    def step(self, data: bytes) -> bytes:
        """One step of a sequence whose state is in the dict."""
        number = data[:NUMBER_BYTES]
        y, self._states[number] = self._run(data, NUMBER_BYTES, self._states[number])
        return bytes(y)

    def step_stateless(self, data: bytes) -> bytes:
        """One step from the state in the message; the new state is in the answer."""
        state = np.frombuffer(data, np.float32, self._state_bytes // 4).reshape(1, -1)
        y, state = self._run(data, self._state_bytes, state)
        return bytes(state) + bytes(y)

    def _run(self, data: bytes, offset: int, state: Any) -> tuple[Any, Any]:
        x = np.frombuffer(data, np.float32, offset=offset).reshape(1, 1, -1)
        feed = {"x": x, "lengths": self._lengths, "state": state}
        found = dict(zip(self._names, self._session.run(self._names, feed), strict=True))
        return found["y"], found["state_out"]

    def asyncio_handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Handlers for an asyncio server."""

        async def stream(messages: AsyncIterator[bytes], context: Any) -> None:
            async for data in messages:
                await context.write(self.step(data))

        async def step(data: bytes, _: Any) -> bytes:
            return self.step(data)

        async def stateless(data: bytes, _: Any) -> bytes:
            return self.step_stateless(data)

        return _handlers(stream, step, stateless)

    def thread_handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Handlers for a server with threads."""

        def stream(messages: Iterator[bytes], _: Any) -> Iterator[bytes]:
            for data in messages:
                yield self.step(data)

        return _handlers(
            stream,
            lambda data, _: self.step(data),
            lambda data, _: self.step_stateless(data),
        )


def _handlers(stream: Any, step: Any, stateless: Any) -> "grpc.GenericRpcHandler[Any, Any]":
    return grpc.method_handlers_generic_handler(
        "plain.Plain",
        {
            "Stream": grpc.stream_stream_rpc_method_handler(stream),
            "Step": grpc.unary_unary_rpc_method_handler(step),
            "Stateless": grpc.unary_unary_rpc_method_handler(stateless),
        },
    )


async def serve(path: str, kind: str) -> None:
    """Serve until the process is ended."""
    plain = Plain(path)
    options = [("grpc.so_reuseport", 0)]
    if kind == "threads":
        threads = grpc.server(ThreadPoolExecutor(THREADS), options=options)
        threads.add_generic_rpc_handlers((plain.thread_handlers(),))
        _say_ready(threads.add_insecure_port("127.0.0.1:0"))
        threads.start()
        await asyncio.to_thread(threads.wait_for_termination)
        return
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((plain.asyncio_handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _say_ready(port)
    await server.wait_for_termination()


def _say_ready(port: int) -> None:
    print(json.dumps({"event": "ready", "listen": f"127.0.0.1:{port}"}), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:3]))
