"""Serves grpc.health.v1 for the server as a whole and for each model."""

from collections.abc import Collection

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

_SERVICES = ("", "sluice.v1.Sequences", "sluice.v1.Models", "inference.GRPCInferenceService")


class Health:
    """The status under "" for the server, each service's name, and each model's name."""

    def __init__(self, names: Collection[str]) -> None:
        """`names` returns the names of the models. It is called for each update of all."""
        self._servicer = HealthServicer()
        self._names = names

    def register(self, server: grpc.aio.Server) -> None:
        """Answer grpc.health.v1 on that server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def say(self, *, is_serving: bool) -> None:
        """Update all names, for those who watch them."""
        for name in (*_SERVICES, *self._names):
            await self.tell(name, is_serving=is_serving)

    async def tell(self, name: str, *, is_serving: bool) -> None:
        """Update one name, for those who watch it."""
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        status = statuses.Value("SERVING" if is_serving else "NOT_SERVING")
        await self._servicer.set(name, status)
