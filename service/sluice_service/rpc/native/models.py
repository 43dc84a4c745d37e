"""Serves sluice.v1.Models: the list of models, and each model's contract."""

from collections.abc import Mapping
from typing import Any

import grpc

from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import (
    GetModelRequest,
    ListModelsRequest,
    ListModelsResponse,
    ModelInfo,
)
from sluice_protos.sequences_pb2_grpc import ModelsServicer
from sluice_service.models.host import Host
from sluice_service.models.registry import find_host
from sluice_service.rpc.status import as_status


class ModelsService(ModelsServicer):
    """Answers the calls of sluice.v1.Models."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = hosts

    async def ListModels(  # noqa: N802 — the name is the protocol's
        self,
        request: ListModelsRequest,
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> ListModelsResponse:
        """Every model that is served."""
        async with as_status(context):
            return ListModelsResponse(models=map(_info, self._hosts.values()))
        raise AssertionError

    async def GetModel(  # noqa: N802
        self,
        request: GetModelRequest,
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> ModelContract:
        """One model's contract."""
        async with as_status(context):
            return find_host(self._hosts, request.name).contract
        raise AssertionError


def _info(host: Host) -> ModelInfo:
    """The description of a model in the list."""
    return ModelInfo(
        name=host.name,
        digest=host.contract.digest,
        is_ready=host.is_welcoming,
        sequences_live=host.sequences_live,
        is_bit_exact=host.version.self_test.is_bit_exact,
        arithmetic=host.version.arithmetic,
    )
