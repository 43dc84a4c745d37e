"""The service inference.GRPCInferenceService: the field's own protocol, for existing clients."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from importlib.metadata import version
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from sluice_protos import open_inference_pb2 as pb
from sluice_service.errors import (
    ModelNotFoundError,
    RepositoryError,
    RequestError,
    ServiceError,
    StoppingError,
)
from sluice_service.metrics import Metrics
from sluice_service.models.host import Host
from sluice_service.models.repository import Repository
from sluice_service.rpc.native.sequences import find_host
from sluice_service.rpc.open_inference import metadata as models
from sluice_service.rpc.open_inference.dispatch import Exchange
from sluice_service.rpc.open_inference.messages import Format, Request
from sluice_service.rpc.status import as_status
from sluice_service.settings import Settings

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

NAME = "inference.GRPCInferenceService"
EXTENSIONS = (
    "model_configuration",
    "sequence",
    "sequence(string_id)",
    "statistics",
)


REPOSITORY = "model_repository"


class _Served:
    """One model as this protocol sees it."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host = host
        self.format = Format(host.name, host.contract, batch_max=settings.run_sequences_max)
        self.exchange = Exchange(host, settings)


class OpenInferenceService:
    """Answers the calls of inference.GRPCInferenceService."""

    def __init__(
        self,
        hosts: Mapping[str, Host],
        repository: Repository | None,
        settings: Settings,
        metrics: Metrics,
        is_ready: Callable[[], bool],
    ) -> None:
        self._hosts = hosts
        self._repository = repository
        self._settings = settings
        self._metrics = metrics
        self._is_ready = is_ready
        self._models: dict[str, _Served] = {}
        self._conversations: set[_Conversation] = set()

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """What a server registers. Inference is handed bytes, so that bad ones get an answer."""
        answers: dict[str, tuple[type[Message], Callable[[Any], Message]]] = {
            "ServerLive": (pb.ServerLiveRequest, self._server_live),
            "ServerReady": (pb.ServerReadyRequest, self._server_ready),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": (pb.ModelConfigRequest, self._model_config),
            "ModelStatistics": (pb.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self._repository_index),
        }
        methods = {name: _unary(read.FromString, give) for name, (read, give) in answers.items()}
        methods["ModelInfer"] = grpc.unary_unary_rpc_method_handler(
            self.model_infer, None, pb.ModelInferResponse.SerializeToString
        )
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.model_stream_infer, None, pb.ModelStreamInferResponse.SerializeToString
        )
        methods["RepositoryModelLoad"] = grpc.unary_unary_rpc_method_handler(
            self.repository_model_load,
            pb.RepositoryModelLoadRequest.FromString,
            pb.RepositoryModelLoadResponse.SerializeToString,
        )
        methods["RepositoryModelUnload"] = grpc.unary_unary_rpc_method_handler(
            self.repository_model_unload,
            pb.RepositoryModelUnloadRequest.FromString,
            pb.RepositoryModelUnloadResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(NAME, methods)

    def drain(self) -> None:
        """Let no sequence wait for a place."""
        for served in self._models.values():
            served.exchange.dismiss(StoppingError("this server is stopping; ask another"))

    def stop(self) -> None:
        """Let every stream end once it has its answers."""
        self.drain()
        for conversation in self._conversations:
            conversation.stop()

    def renew(self, name: str) -> None:
        """A model has come, has another version, or has gone."""
        served = self._models.get(name)
        if served is None:
            return
        served.exchange.renew()
        if self._hosts.get(name) is not served.host:
            del self._models[name]

    # Inference.

    async def model_infer(self, data: bytes, context: Context) -> pb.ModelInferResponse:
        """Run one request."""
        async with as_status(context):
            done = asyncio.Event()
            request = Request(done.set)
            message = parse(data)
            served = self.submit(message, request)
            try:
                await done.wait()
            except asyncio.CancelledError:
                if served is not None:
                    served.exchange.cancel(request)
                raise
            if served is not None:
                served.exchange.tally.count(request)
            if served is None or request.error is not None:
                raise request.error or ServiceError("an error inside the server")
            return served.format.answer(request)
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

    def submit(self, message: pb.ModelInferRequest, request: Request) -> "_Served | None":
        """Read a request and take it in, or fail it; whose it is, where there is such a model."""
        served = None
        request.id = message.id
        try:
            served = self._find(message.model_name, message.model_version)
            served.format.read(message, request)
        except ServiceError as error:
            request.fail(error)
        else:
            served.exchange.submit(request)
        return served

    def _find(self, name: str, number: str) -> _Served:
        """A model, where the version asked for is loaded. Raises ModelNotFoundError."""
        host = find_host(self._hosts, name)
        if number and not any(str(version.number) == number for version in host.versions):
            loaded = ", ".join(str(version.number) for version in host.versions)
            raise ModelNotFoundError(
                f"there is no version {number!r} of model {name!r}; leave it out, or ask for one "
                f"of: {loaded}"
            )
        served = self._models.get(name)
        if served is None or served.host is not host:
            served = self._models[name] = _Served(host, self._settings)
            exchange = served.exchange
            self._metrics.follow(name, {self._metrics.sequences_waiting: lambda: exchange.waiting})
        return served

    # The repository.

    async def repository_model_load(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model's newest version."""
        async with as_status(context):
            if request.parameters:
                raise RequestError(
                    f"parameters {sorted(request.parameters)} are unknown here: a model is what "
                    "lies in the repository"
                )
            await self._require_repository().load(request.model_name)
            return pb.RepositoryModelLoadResponse()
        raise AssertionError

    async def repository_model_unload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Let no sequence of a model begin; those that live finish."""
        async with as_status(context):
            await self._require_repository().unload(request.model_name)
            return pb.RepositoryModelUnloadResponse()
        raise AssertionError

    def _require_repository(self) -> Repository:
        if self._repository is None:
            raise RepositoryError(
                "this server has no repository: its models are named with --model; serve a folder "
                "of them with --model-repository DIR and --model-control explicit"
            )
        return self._repository

    # Questions.

    def _server_live(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def _server_ready(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._is_ready())

    def _model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        host = self._hosts.get(request.name)
        is_there = (
            host is not None
            and host.is_welcoming
            and request.version in ("", str(host.version.number))
        )
        return pb.ModelReadyResponse(ready=is_there and self._is_ready())

    def _server_metadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="sluice",
            version=version("sluice-serving"),
            extensions=EXTENSIONS if self._repository is None else (*EXTENSIONS, REPOSITORY),
        )

    def _model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        return models.describe(self._find(request.name, request.version).host)

    def _model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        host = self._find(request.name, request.version).host
        config = models.configure(host.name, host.contract, self._settings)
        return pb.ModelConfigResponse(config=config)

    def _model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        chosen = (
            [self._find(request.name, request.version)]
            if request.name
            else [self._find(name, "") for name in self._hosts]
        )
        return pb.ModelStatisticsResponse(
            model_stats=[
                models.count(
                    served.host, self._metrics.model(served.host.name), served.exchange.tally
                )
                for served in chosen
            ]
        )

    def _repository_index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        entries = [entry for host in self._hosts.values() for entry in models.index(host)]
        if self._repository is not None:
            entries += models.list_others(self._repository)
        return pb.RepositoryIndexResponse(
            models=[entry for entry in entries if entry.state == "READY" or not request.ready]
        )


class _Conversation:
    """One stream: a reader that submits requests, a writer that answers them in their order."""

    def __init__(self, service: OpenInferenceService, context: Context, settings: Settings) -> None:
        self._service = service
        self._context = context
        self._settings = settings
        # Header of clients that want an error as the status of the call.
        metadata = dict(context.invocation_metadata() or ())
        self._ends_with_errors = metadata.get("triton_grpc_error") == "true"
        # Requests, whose they are, the model they name, and the bytes of their messages.
        self._pending: deque[tuple[Request, _Served | None, str, int]] = deque()
        self._changed = asyncio.Event()
        self._may_read = asyncio.Event()
        # What has not been answered: a client that does not read must not fill the memory.
        self._unsent_steps = self._unsent_bytes = 0
        self._is_stopping = False

    def stop(self) -> None:
        """End once every request has its answer."""
        self._is_stopping = True
        self._changed.set()

    async def serve(self) -> None:
        """Until the client sends no more and has all its answers, or the server stops."""
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
            for request, served, _, _ in self._pending:
                if served is not None:
                    served.exchange.cancel(request)

    async def _read(self) -> None:
        # From the context, which costs less than the iterator around it.
        while isinstance(data := await self._context.read(), bytes):
            message = parse(data)
            request = Request(self._changed.set)
            served = self._service.submit(message, request)
            self._pending.append((request, served, message.model_name, len(data)))
            self._unsent_steps += request.batch * request.steps
            self._unsent_bytes += len(data)
            while self._pending and self._is_ahead(served):
                self._may_read.clear()
                await self._may_read.wait()

    def _is_ahead(self, served: _Served | None) -> bool:
        """True while the client has to read, or the model to catch up, before more is read."""
        limits = self._settings if served is None else served.host.limits
        return (
            self._unsent_steps >= limits.unacknowledged_steps_max
            or self._unsent_bytes >= self._settings.stream_queue_bytes_max
            or (served is not None and served.exchange.is_full)
        )

    async def _write(self, request: Request, served: _Served | None, name: str, size: int) -> None:
        if served is not None:
            served.exchange.tally.count(request)
        if served is not None and request.error is None:
            response = pb.ModelStreamInferResponse(infer_response=served.format.answer(request))
        elif request.error is not None and self._ends_with_errors:
            raise request.error
        else:
            response = pb.ModelStreamInferResponse(
                error_message=str(request.error),
                infer_response=pb.ModelInferResponse(
                    model_name=name, model_version=request.version, id=request.id
                ),
            )
        await self._context.write(response)
        self._unsent_steps -= request.batch * request.steps
        self._unsent_bytes -= size


def parse(data: bytes) -> pb.ModelInferRequest:
    """A request from its bytes. Raises RequestError."""
    try:
        return pb.ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise RequestError(
            "a message that is not an inference.ModelInferRequest (truncated, or of another call)"
        ) from error


def _unary(
    read: Callable[[bytes], Any], give: Callable[[Any], Message]
) -> "grpc.RpcMethodHandler[Any, Any]":
    """A call whose answer is there at once."""

    async def answer(request: Any, context: Context) -> Message:
        async with as_status(context):
            return give(request)
        raise AssertionError

    return grpc.unary_unary_rpc_method_handler(
        answer, read, lambda message: message.SerializeToString()
    )
