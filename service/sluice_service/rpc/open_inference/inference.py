"""Answers ModelInfer and ModelStreamInfer: runs requests and writes their answers."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeAlias

import grpc

from sluice_protos import open_inference_pb2 as pb
from sluice_service.errors import ModelNotFoundError, ServiceError
from sluice_service.metrics import Metrics
from sluice_service.models.host import Host
from sluice_service.models.registry import find_host
from sluice_service.rpc.open_inference import refusals
from sluice_service.rpc.open_inference.dispatch import Dispatcher
from sluice_service.rpc.open_inference.messages import ModelFormat, parse
from sluice_service.rpc.open_inference.requests import InferRequest
from sluice_service.rpc.status import as_status
from sluice_service.settings import Settings

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ServedModel:
    """One model in this protocol, with counts of its answered requests."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host = host
        self.format = ModelFormat(host.name, host.contract, batch_max=settings.run_sequences_max)
        self.dispatcher = Dispatcher(host, settings)
        self.succeeded = self.failed = 0
        self.succeeded_seconds = self.failed_seconds = 0.0
        self.last_time = 0.0  # of the last success, in seconds since 1970

    def count(self, request: InferRequest) -> None:
        """Count a request that is done."""
        seconds = time.monotonic() - request.arrived
        if request.error is None:
            self.succeeded += 1
            self.succeeded_seconds += seconds
            self.last_time = time.time()
        else:
            self.failed += 1
            self.failed_seconds += seconds


class Inference:
    """The inference calls of all models."""

    def __init__(self, hosts: Mapping[str, Host], settings: Settings, metrics: Metrics) -> None:
        self._hosts = hosts
        self._settings = settings
        self._metrics = metrics
        self._models: dict[str, ServedModel] = {}
        self._conversations: set[_Conversation] = set()

    def find(self, name: str, version: str = "") -> ServedModel:
        """A model of which the requested version is loaded. Raises ModelNotFoundError."""
        host = find_host(self._hosts, name)
        if version and not any(str(one.number) == version for one in host.versions):
            loaded = ", ".join(str(one.number) for one in host.versions)
            raise ModelNotFoundError(
                f"there is no version {version!r} of model {name!r}; leave it out, or ask for one "
                f"of: {loaded}"
            )
        model = self._models.get(name)
        if model is None or model.host is not host:
            model = self._models[name] = ServedModel(host, self._settings)
            backlog = model.dispatcher.backlog
            self._metrics.follow(name, {self._metrics.sequences_waiting: lambda: len(backlog)})
        return model

    def submit(self, message: pb.ModelInferRequest, request: InferRequest) -> ServedModel | None:
        """Read a request and submit it, or fail it. Returns its model, if there is one."""
        model = None
        request.id, request.model_name = message.id, message.model_name
        try:
            model = self.find(request.model_name, message.model_version)
            model.format.read(message, request)
        except ServiceError as error:
            request.fail(error)
        else:
            model.dispatcher.submit(request)
        return model

    async def model_infer(self, data: bytes, context: Context) -> pb.ModelInferResponse:
        """Run one request."""
        async with as_status(context):
            done = asyncio.Event()
            request = InferRequest(done.set)
            model = self.submit(parse(data), request)
            try:
                await done.wait()
            except asyncio.CancelledError:
                if model is not None:
                    model.dispatcher.cancel(request)
                raise
            if model is not None:
                model.count(request)
            if model is None or request.error is not None:
                raise request.error or ServiceError("an error inside the server")
            return model.format.write(request)
        raise AssertionError

    async def model_stream_infer(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Run the requests of one stream, and answer them in their order."""
        async with as_status(context):
            conversation = _Conversation(self, context, self._settings)
            self._conversations.add(conversation)
            try:
                await conversation.serve()
            finally:
                self._conversations.discard(conversation)

    def drain(self) -> None:
        """Let no sequence wait for a place."""
        for model in self._models.values():
            model.dispatcher.dismiss_all(refusals.stopping())

    def stop(self) -> None:
        """Let every stream end once it has its answers."""
        self.drain()
        for conversation in self._conversations:
            conversation.stop()

    def model_changed(self, name: str) -> None:
        """A model was added, has another version, or was removed."""
        model = self._models.get(name)
        if model is None:
            return
        model.dispatcher.model_changed()
        if self._hosts.get(name) is not model.host:
            del self._models[name]


class _Conversation:
    """One stream: a reader that submits requests, a writer that answers them in their order."""

    def __init__(self, inference: Inference, context: Context, settings: Settings) -> None:
        self._inference = inference
        self._context = context
        self._settings = settings
        # Clients send this header to get an error as the status of the call.
        metadata = dict(context.invocation_metadata() or ())
        self._ends_with_errors = metadata.get("triton_grpc_error") == "true"
        # Unanswered requests, with their models and the bytes of their messages.
        self._pending: deque[tuple[InferRequest, ServedModel | None, int]] = deque()
        self._changed = asyncio.Event()
        self._may_read = asyncio.Event()
        # The sum of these bytes, so that a client that does not read cannot fill the memory.
        self._unsent_steps = self._unsent_bytes = 0
        self._is_stopping = False

    def stop(self) -> None:
        """End once every request has its answer."""
        self._is_stopping = True
        self._changed.set()

    async def serve(self) -> None:
        """Serve until the client sends no more and has all its answers, or the server stops."""
        reader = asyncio.ensure_future(self._read())
        reader.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                while self._pending and self._pending[0][0].is_done:
                    await self._write(*self._pending.popleft())
                    self._may_read.set()
                if not self._pending and (reader.done() or self._is_stopping):
                    if reader.done():
                        reader.result()
                    return
                self._changed.clear()
                await self._changed.wait()
        finally:
            reader.cancel()
            for request, model, _ in self._pending:
                if model is not None:
                    model.dispatcher.cancel(request)

    async def _read(self) -> None:
        # Read from the context, which costs less than the iterator.
        while isinstance(data := await self._context.read(), bytes):
            request = InferRequest(self._changed.set)
            model = self._inference.submit(parse(data), request)
            self._pending.append((request, model, len(data)))
            self._unsent_steps += request.batch * request.steps
            self._unsent_bytes += len(data)
            while self._pending and self._is_ahead(model):
                self._may_read.clear()
                await self._may_read.wait()

    def _is_ahead(self, model: ServedModel | None) -> bool:
        """True while reading pauses, until the client reads or the model catches up."""
        limits = self._settings if model is None else model.host.limits
        return (
            self._unsent_steps >= limits.unacknowledged_steps_max
            or self._unsent_bytes >= self._settings.stream_queue_bytes_max
            or (model is not None and model.dispatcher.is_full)
        )

    async def _write(self, request: InferRequest, model: ServedModel | None, size: int) -> None:
        if model is not None:
            model.count(request)
        if model is not None and request.error is None:
            response = pb.ModelStreamInferResponse(infer_response=model.format.write(request))
        elif request.error is not None and self._ends_with_errors:
            raise request.error
        else:
            response = pb.ModelStreamInferResponse(
                error_message=str(request.error),
                infer_response=pb.ModelInferResponse(
                    model_name=request.model_name, model_version=request.version, id=request.id
                ),
            )
        await self._context.write(response)
        self._unsent_steps -= request.batch * request.steps
        self._unsent_bytes -= size
