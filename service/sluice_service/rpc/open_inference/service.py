"""Registers the calls of inference.GRPCInferenceService, each with its handler."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import Message

from sluice_protos import open_inference_pb2 as pb
from sluice_service.metrics import Metrics
from sluice_service.models.host import Host
from sluice_service.models.repository import Repository
from sluice_service.rpc.open_inference.inference import Context, Inference
from sluice_service.rpc.open_inference.metadata import Metadata
from sluice_service.rpc.open_inference.repository import RepositoryControl
from sluice_service.rpc.status import as_status
from sluice_service.settings import Settings

NAME = "inference.GRPCInferenceService"


class OpenInferenceService:
    """The Open Inference Protocol, for existing clients."""

    def __init__(
        self,
        hosts: Mapping[str, Host],
        repository: Repository | None,
        settings: Settings,
        metrics: Metrics,
        is_ready: Callable[[], bool],
    ) -> None:
        self.inference = Inference(hosts, settings, metrics)
        has_repository = repository is not None
        self._metadata = Metadata(
            hosts, self.inference, settings, metrics, is_ready, has_repository=has_repository
        )
        self._repository = RepositoryControl(hosts, repository)

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """The handler for a server. Inference gets bytes, so that bad ones get a clear error."""
        inference, metadata, repository = self.inference, self._metadata, self._repository
        methods = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(
                inference.model_infer, None, pb.ModelInferResponse.SerializeToString
            ),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                inference.model_stream_infer, None, pb.ModelStreamInferResponse.SerializeToString
            ),
            "ServerLive": _unary(pb.ServerLiveRequest, metadata.server_live),
            "ServerReady": _unary(pb.ServerReadyRequest, metadata.server_ready),
            "ModelReady": _unary(pb.ModelReadyRequest, metadata.model_ready),
            "ServerMetadata": _unary(pb.ServerMetadataRequest, metadata.server_metadata),
            "ModelMetadata": _unary(pb.ModelMetadataRequest, metadata.model_metadata),
            "ModelConfig": _unary(pb.ModelConfigRequest, metadata.model_config),
            "ModelStatistics": _unary(pb.ModelStatisticsRequest, metadata.model_statistics),
            "RepositoryIndex": _unary(pb.RepositoryIndexRequest, repository.index),
            "RepositoryModelLoad": _unary(pb.RepositoryModelLoadRequest, repository.load),
            "RepositoryModelUnload": _unary(pb.RepositoryModelUnloadRequest, repository.unload),
        }
        return grpc.method_handlers_generic_handler(NAME, methods)

    def drain(self) -> None:
        """Let no sequence wait for a place."""
        self.inference.drain()

    def stop(self) -> None:
        """Let every stream end once it has its answers."""
        self.inference.stop()

    def model_changed(self, name: str) -> None:
        """A model was added, has another version, or was removed."""
        self.inference.model_changed(name)


def _unary(
    message: type[Message], answer: Callable[[Any], Awaitable[Message]]
) -> "grpc.RpcMethodHandler[Any, Any]":
    """A call that takes one `message` and gets one answer."""

    async def respond(request: Any, context: Context) -> Message:
        async with as_status(context):
            return await answer(request)
        raise AssertionError

    return grpc.unary_unary_rpc_method_handler(
        respond, message.FromString, lambda response: response.SerializeToString()
    )
