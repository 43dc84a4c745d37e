"""Assembles a server, serves, and stops in good order."""

import asyncio
import socket
from importlib.metadata import version

import grpc
import structlog
from aiohttp import web
from grpc_reflection.v1alpha import reflection

from sluice_protos import open_inference_pb2, sequences_pb2
from sluice_protos.sequences_pb2_grpc import add_ModelsServicer_to_server
from sluice_service.metrics import Metrics, as_info
from sluice_service.models.registry import Hosts
from sluice_service.models.repository import Repository
from sluice_service.pages import make_app
from sluice_service.rpc.health import Health
from sluice_service.rpc.native.models import ModelsService
from sluice_service.rpc.native.sequences import SequencesService
from sluice_service.rpc.open_inference.service import OpenInferenceService
from sluice_service.runtime import memory
from sluice_service.settings import Settings
from sluice_service.store import Store, open_store

log = structlog.get_logger()

# What is left of a stop after the drain: calls that do not end by themselves.
GRACE_SECONDS = 2.0
_KEEPALIVE_SECONDS = 30
_PING_SECONDS_MIN = 10


class Server:
    """A server from its settings. `await start()`, then `await stop()`."""

    def __init__(self, settings: Settings, *, shares_port: bool = False) -> None:
        """Load every model, test it and warm it up; takes seconds.

        Raises ModelError when a file cannot be served, StoreSetupError for a bad store.
        """
        self.settings = settings
        self._shares_port = shares_port
        self.metrics = Metrics()
        self.grpc_port = 0
        self.http_port = 0
        self._is_ready = False
        self._store = _store(settings)
        self._hosts = Hosts(settings, self.metrics, self._store, self._changed)
        for name, path in settings.model.items():
            self._hosts.add(name, self._hosts.load(path))
        self._repository: Repository | None = None
        if settings.model_repository is not None:
            self._repository = Repository(
                settings.model_repository, settings, self._hosts, self.metrics
            )
            self._repository.open()
        self._health = Health(self._hosts)
        self._open_inference = OpenInferenceService(
            self._hosts, self._repository, settings, self.metrics, lambda: self._is_ready
        )
        self._following: asyncio.Task[None] | None = None
        self._resting: asyncio.Task[None] | None = None
        packages = ("sluice-serving", "onnxruntime", "grpcio", "numpy")
        self.metrics.build.info(as_info({package: version(package) for package in packages}))

    async def start(self) -> None:
        """Listen, and say ready once both ports are open.

        Raises OSError when one is taken, StoreSetupError or StoreError when the store
        cannot be used.
        """
        if self._store is not None:
            for warning in await self._store.start():
                log.warning("store", warning=warning)
        if not self._shares_port:
            require_free("listen", self.settings.listen)
        require_free("http", self.settings.http)
        self._http = web.AppRunner(
            make_app(self._expose, lambda: self._is_ready, self._trouble),
            access_log=None,
            handle_signals=False,
        )
        await self._http.setup()
        host, _, port = self.settings.http.rpartition(":")
        site = web.TCPSite(self._http, host.strip("[]"), int(port))
        await site.start()
        self.http_port = self._http.addresses[0][1]

        self._grpc = grpc.aio.server(options=self._options())
        self._grpc.add_generic_rpc_handlers((SequencesService(self._hosts).handler(),))
        add_ModelsServicer_to_server(ModelsService(self._hosts), self._grpc)
        self._health.register(self._grpc)
        self._grpc.add_generic_rpc_handlers((self._open_inference.handler(),))
        names = [
            service.full_name
            for file in (sequences_pb2, open_inference_pb2)
            for service in file.DESCRIPTOR.services_by_name.values()
        ]
        reflection.enable_server_reflection(
            [*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], self._grpc
        )
        try:
            self.grpc_port = self._grpc.add_insecure_port(self.settings.listen)
        except RuntimeError as error:
            await self._http.cleanup()
            raise OSError(
                f"cannot listen on {self.settings.listen}; is another server there? "
                "Choose another address with --listen"
            ) from error
        await self._grpc.start()
        self._hosts.start()
        if self._repository is not None:
            self._following = asyncio.create_task(self._repository.live())
        memory.settle()
        self._resting = asyncio.create_task(memory.give_back_when_quiet(self._hosts.activity))
        await self._say(is_ready=True)
        log.info(
            "ready",
            listen=f"{self.settings.listen.rpartition(':')[0]}:{self.grpc_port}",
            http=f"{host}:{self.http_port}",
            models=sorted(self._hosts),
        )

    async def stop(self) -> None:
        """Not ready → open nothing new → finish what is queued → tell every lane → close."""
        await self._say(is_ready=False)
        log.info("draining")
        for task in (self._following, self._resting):
            if task is not None:
                task.cancel()
        self._open_inference.drain()
        try:
            await asyncio.wait_for(self._hosts.drain(), self.settings.drain_seconds_max)
        except TimeoutError:
            log.warning("drain_cut_off", seconds=self.settings.drain_seconds_max)
        self._open_inference.stop()
        self._hosts.stop()
        await self._grpc.stop(GRACE_SECONDS)
        await self._http.cleanup()
        if self._store is not None:
            await self._store.stop()
        log.info("stopped")

    async def _expose(self, accept: str) -> tuple[bytes, str]:
        return self.metrics.expose(accept)

    def _trouble(self) -> str:
        """What an operator should know of a server that serves all the same."""
        down = max((host.store_down_seconds for host in self._hosts.values()), default=0.0)
        return f": the store has not answered for {down:.0f} seconds" if down else ""

    async def _say(self, *, is_ready: bool) -> None:
        self._is_ready = is_ready
        self.metrics.is_ready.set(is_ready)
        await self._health.say(is_serving=is_ready)

    async def _changed(self, name: str) -> None:
        """A model has come, has another version, or has gone."""
        self._open_inference.model_changed(name)
        is_serving = self._is_ready and name in self._hosts and self._hosts[name].is_welcoming
        await self._health.tell(name, is_serving=is_serving)

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", self.settings.request_bytes_max),
            # Responses are cut to what each client says it takes.
            ("grpc.max_send_message_length", -1),
            # Two servers on one port each get some of a client's calls: only workers,
            # which share a store, may.
            ("grpc.so_reuseport", int(self._shares_port)),
            ("grpc.keepalive_time_ms", _KEEPALIVE_SECONDS * 1000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", _PING_SECONDS_MIN * 1000),
            ("grpc.http2.max_ping_strikes", 5),
        ]


def _store(settings: Settings) -> Store | None:
    """The store that sequences are kept in, if they are. Raises StoreSetupError."""
    store = open_store(
        settings.store,
        tombstone_seconds=settings.tombstone_seconds,
        record_seconds=settings.record_seconds,
    )
    if settings.durability != "off":
        return store
    if settings.store != "memory":
        log.warning("store_unused", fix="with --durability off nothing is stored; set periodic")
    return None


def require_free(flag: str, address: str) -> None:
    """Raise OSError, which names the flag, where nobody could listen on HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise OSError(
            f"cannot listen on {address} ({error.strerror or error}); is another server there? "
            f"Choose another address with --{flag}"
        ) from error
