"""Assembles a server from its settings, starts it, and drains and stops it."""

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version

import grpc
import structlog
from grpc_reflection.v1alpha import reflection

from sluice_protos import open_inference_pb2, sequences_pb2
from sluice_protos.sequences_pb2_grpc import add_ModelsServicer_to_server
from sluice_service.metrics import Metrics, as_info
from sluice_service.models.registry import Hosts
from sluice_service.models.repository import Repository
from sluice_service.rpc.health import Health
from sluice_service.rpc.native.models import ModelsService
from sluice_service.rpc.native.service import SequencesService
from sluice_service.rpc.open_inference.service import OpenInferenceService
from sluice_service.runtime import memory
from sluice_service.settings import Settings
from sluice_service.store import Store, StoreSetupError, open_store

log = structlog.get_logger()

# After a drain, calls that do not end by themselves are cancelled after this time.
GRACE_SECONDS = 2.0
_KEEPALIVE_SECONDS = 30
_PING_SECONDS_MIN = 10


class Server:
    """A server from its settings. `await start()`, then `await stop()`."""

    def __init__(
        self, settings: Settings, *, store: Store | None = None, shares_port: bool = False
    ) -> None:
        """Load and test every model, which takes seconds.

        `store` is used in place of the one that the settings name. Raises ModelError when a
        file cannot be served, StoreSetupError when the store cannot be used.
        """
        self.settings = settings
        self._shares_port = shares_port
        self.metrics = Metrics()
        self.grpc_port = 0
        self.http_port = 0
        self._is_ready = False
        self.store = store if store is not None else _open_store(settings)
        self.hosts = Hosts(settings, self.metrics, self.store, self._changed)
        self._repository: Repository | None = None
        if settings.model_repository is not None:
            self._repository = Repository(
                settings.model_repository, settings, self.hosts, self.metrics
            )
        self._load()
        self._health = Health(self.hosts)
        self._open_inference = OpenInferenceService(
            self.hosts, self._repository, settings, self.metrics, lambda: self._is_ready
        )
        self._following: asyncio.Task[None] | None = None
        self._resting: asyncio.Task[None] | None = None
        packages = ("sluice-serving", "onnxruntime", "grpcio", "numpy")
        self.metrics.build.info(as_info({package: version(package) for package in packages}))

    def _load(self) -> None:
        """Load all models, as many at once as there are cores, and import aiohttp meanwhile."""
        threads = ThreadPoolExecutor(os.cpu_count(), "load")
        try:
            load = partial(self.hosts.load, warms_up=False)
            named = threads.map(load, self.settings.model.values())
            found = self._repository.open(threads) if self._repository is not None else ()
            from sluice_service.pages import Pages  # noqa: PLC0415 - see there

            self._pages = Pages(self._expose, lambda: self._is_ready, self._trouble)
            models = list(zip(self.settings.model, named, strict=True))
            loaded_by_repository = list(found)
        finally:
            threads.shutdown(cancel_futures=True)
        # One after another, with nothing else going on: runs are measured here.
        for name, loaded in models:
            loaded.warm_up()
            self.hosts.add(name, loaded)
        if self._repository is not None:
            self._repository.serve(loaded_by_repository)

    async def start(self) -> None:
        """Open both ports, then report ready.

        Raises OSError when a port is taken, StoreSetupError or StoreError when the store
        cannot be used.
        """
        if self.store is not None:
            for warning in await self.store.start():
                log.warning("store", warning=warning)
        if not self._shares_port:
            require_free("listen", self.settings.listen)
        require_free("http", self.settings.http)
        await self._pages.start(self.settings.http)
        self.http_port = self._pages.port

        self._grpc = grpc.aio.server(options=self._options())
        self._grpc.add_generic_rpc_handlers((SequencesService(self.hosts).handler(),))
        add_ModelsServicer_to_server(ModelsService(self.hosts), self._grpc)
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
            await self._pages.stop()
            raise OSError(
                f"cannot listen on {self.settings.listen}; is another server there? "
                "Choose another address with --listen"
            ) from error
        await self._grpc.start()
        self.hosts.start()
        if self._repository is not None:
            self._following = asyncio.create_task(self._repository.live())
        memory.settle()
        self._resting = asyncio.create_task(memory.give_back_when_quiet(self.hosts.activity))
        await self._report(is_ready=True)
        log.info(
            "ready",
            listen=f"{self.settings.listen.rpartition(':')[0]}:{self.grpc_port}",
            http=f"{self.settings.http.rpartition(':')[0]}:{self.http_port}",
            models=sorted(self.hosts),
        )

    async def stop(self) -> None:
        """Report not ready, open nothing new, finish what is queued, tell every lane, close."""
        await self._report(is_ready=False)
        log.info("draining")
        for task in (self._following, self._resting):
            if task is not None:
                task.cancel()
        self._open_inference.drain()
        try:
            await asyncio.wait_for(self.hosts.drain(), self.settings.drain_seconds_max)
        except TimeoutError:
            log.warning("drain_cut_off", seconds=self.settings.drain_seconds_max)
        self._open_inference.stop()
        self.hosts.stop()
        await self._grpc.stop(GRACE_SECONDS)
        await self._pages.stop()
        if self.store is not None:
            await self.store.stop()
        log.info("stopped")

    async def _expose(self, accept: str) -> tuple[bytes, str]:
        return self.metrics.expose(accept)

    def _trouble(self) -> str:
        """What an operator should know although the server is ready; or nothing."""
        down = max((host.store_down_seconds for host in self.hosts.values()), default=0.0)
        return f": the store has not answered for {down:.0f} seconds" if down else ""

    async def _report(self, *, is_ready: bool) -> None:
        self._is_ready = is_ready
        self.metrics.is_ready.set(is_ready)
        await self._health.say(is_serving=is_ready)

    async def _changed(self, name: str) -> None:
        """A model was added, has another version, or was removed."""
        self._open_inference.model_changed(name)
        is_serving = self._is_ready and name in self.hosts and self.hosts[name].is_welcoming
        await self._health.tell(name, is_serving=is_serving)

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", self.settings.request_bytes_max),
            # Responses are cut to the size that each client accepts.
            ("grpc.max_send_message_length", -1),
            # Servers that share a port each get some of a client's connections: only workers,
            # which share a store, may do so.
            ("grpc.so_reuseport", int(self._shares_port)),
            ("grpc.keepalive_time_ms", _KEEPALIVE_SECONDS * 1000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", _PING_SECONDS_MIN * 1000),
            ("grpc.http2.max_ping_strikes", 5),
        ]


def _open_store(settings: Settings) -> Store | None:
    """The store that the settings name; None without durability. Raises StoreSetupError."""
    if settings.store is None:
        if settings.durability != "off":
            raise StoreSetupError(
                f"--durability {settings.durability} needs a store; name one with --store "
                "sqlite:///PATH or redis://HOST:PORT, or serve with --durability off"
            )
        return None
    store = open_store(
        settings.store,
        tombstone_seconds=settings.tombstone_seconds,
        record_seconds=settings.record_seconds,
    )
    if settings.durability == "off":
        log.warning("store_unused", fix="--durability off stores nothing; use periodic or strict")
        return None
    return store


def require_free(flag: str, address: str) -> None:
    """Raise OSError, which names the flag, if HOST:PORT cannot be listened on."""
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
