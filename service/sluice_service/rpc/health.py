"""The field's health protocol, grpc.health.v1: the server as a whole, and each model."""

from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer


class Health:
    """Serving or not, under "" for the server, the services' names, and each model's name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._servicer = HealthServicer()
        services = ("sluice.v1.Sequences", "sluice.v1.Models", "inference.GRPCInferenceService")
        self._names = ["", *services, *names]

    def register(self, server: grpc.aio.Server) -> None:
        """Answer grpc.health.v1 on that server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def say(self, *, is_serving: bool) -> None:
        """Tell everyone who watches."""
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        status = statuses.Value("SERVING" if is_serving else "NOT_SERVING")
        for name in self._names:
            await self._servicer.set(name, status)
