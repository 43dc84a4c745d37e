"""The field's health protocol, grpc.health.v1: the server as a whole, and each model."""

from collections.abc import Collection

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

_SERVICES = ("", "sluice.v1.Sequences", "sluice.v1.Models", "inference.GRPCInferenceService")


class Health:
    """Serving or not, under "" for the server, the services' names, and each model's name."""

    def __init__(self, names: Collection[str]) -> None:
        """`names` are those of the models, as they are whenever all are told."""
        self._servicer = HealthServicer()
        self._names = names

    def register(self, server: grpc.aio.Server) -> None:
        """Answer grpc.health.v1 on that server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def say(self, *, is_serving: bool) -> None:
        """Tell everyone who watches."""
        for name in (*_SERVICES, *self._names):
            await self.tell(name, is_serving=is_serving)

    async def tell(self, name: str, *, is_serving: bool) -> None:
        """Tell everyone who watches one name."""
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        status = statuses.Value("SERVING" if is_serving else "NOT_SERVING")
        await self._servicer.set(name, status)
