"""Runs a server until a signal stops it: in this process, or as several worker processes.

Workers share one port and one store. The parent process restarts workers that die, and
serves the pages of all of them as one.
"""

import asyncio
import contextlib
import multiprocessing
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import structlog
import uvloop

from sluice_model import ModelError
from sluice_service.logs import set_up_logs
from sluice_service.metrics import merge_pages
from sluice_service.server import GRACE_SECONDS, Server, require_free
from sluice_service.settings import Settings
from sluice_service.store import StoreError, StoreSetupError

log = structlog.get_logger()

# The first and the longest pause before a worker that died is started again. It doubles each time,
# unless the worker has lived for long, so that one that dies at every start does not keep the
# machine busy.
_RESTART_SECONDS = (0.1, 10.0)
_LIVED_LONG_SECONDS = 60.0


class Worker:
    """One server process, restarted whenever it dies."""

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        # HOST:PORT of its pages; empty while it does not serve.
        self.http = ""
        self._settings = settings
        self._process: BaseProcess | None = None
        self._is_stopping = False

    async def keep_running(self, *, has_started: asyncio.Event) -> None:
        """Run the process until `stop`. Raises OSError when it dies before `has_started`."""
        wait = _RESTART_SECONDS[0]
        loop = asyncio.get_running_loop()
        while not self._is_stopping:
            started = loop.time()
            try:
                receiver = self._start()
            except OSError as error:
                # The machine has no resources for it now. Try again while the others continue.
                if not has_started.is_set():
                    raise
                log.error("worker_not_started", worker=self.number, reason=str(error))
            else:
                await self._watch(receiver)
                if not self._is_stopping and not has_started.is_set():
                    raise OSError("a worker could not start; its log lines say why")
                if self._is_stopping:
                    return
                log.error("worker_died", worker=self.number, exit=self._exit_code)
            has_lived = loop.time() - started > _LIVED_LONG_SECONDS
            wait = _RESTART_SECONDS[0] if has_lived else min(2 * wait, _RESTART_SECONDS[1])
            await asyncio.sleep(wait)

    @property
    def _exit_code(self) -> int | None:
        return self._process.exitcode if self._process is not None else None

    def _start(self) -> "Connection[str, str]":
        """Start the process; return the pipe on which it tells its address. Raises OSError."""
        # Spawned, not forked: gRPC's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(self._settings, self.number, sender), name=f"worker {self.number}"
        )
        try:
            process.start()
        except OSError:
            receiver.close()
            raise
        finally:
            sender.close()
        self._process = process
        return receiver

    async def _watch(self, receiver: "Connection[str, str]") -> None:
        """Wait until the process serves, then until it ends."""
        assert self._process is not None
        # Wait on descriptors, not in threads: there may be more workers than threads in a pool.
        await _is_readable(receiver.fileno())
        with contextlib.suppress(EOFError):
            self.http = receiver.recv()
        receiver.close()
        await _is_readable(self._process.sentinel)
        self._process.join()
        self.http = ""

    def stop(self) -> None:
        """Ask the process to drain and stop."""
        self._is_stopping = True
        if self._process is not None and self._process.is_alive():
            self._process.terminate()

    def kill(self) -> None:
        """Kill the process if it has not stopped in time."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()


async def _is_readable(descriptor: int) -> None:
    """Wait until there is something to read, or the other end is closed."""
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)


def work(settings: Settings, number: int, sender: "Connection[str, str]") -> None:
    """Serve, in a worker's process."""
    set_up_logs(settings)
    structlog.contextvars.bind_contextvars(worker=number)
    try:
        uvloop.run(_work(settings, sender))
    except (ModelError, OSError, StoreError, StoreSetupError) as error:
        log.error("cannot_start", reason=str(error))
        raise SystemExit(2) from None


async def _work(settings: Settings, sender: "Connection[str, str]") -> None:
    server = Server(settings, shares_port=True)
    stopping = _stop_signal()
    if (parent := multiprocessing.parent_process()) is not None:
        # A worker stops when its parent has died, because nothing else would make it free the port.
        asyncio.get_running_loop().add_reader(parent.sentinel, stopping.set)

    def tell() -> None:
        sender.send(f"127.0.0.1:{server.http_port}")
        sender.close()

    await _serve(server, stopping, on_started=tell)


async def _serve(
    server: Server, stopping: asyncio.Event, on_started: Callable[[], None] = lambda: None
) -> None:
    await server.start()
    on_started()
    await stopping.wait()
    with contextlib.suppress(asyncio.CancelledError):
        await server.stop()


def _stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


class Workers:
    """The worker processes of one server, their common port, and their pages as one."""

    def __init__(self, settings: Settings) -> None:
        """Reserve the port; no process runs yet. Raises OSError when a port is taken."""
        require_free("listen", settings.listen)
        require_free("http", settings.http)
        self._settings = settings
        # Bound but not listening: it reserves the port for the workers and accepts no calls.
        self._port = _reserve(settings.listen)
        host = settings.listen.rpartition(":")[0]
        self.grpc_port = self._port.getsockname()[1]
        self.http_port = 0
        shared = settings.model_copy(
            update={"listen": f"{host}:{self.grpc_port}", "http": "127.0.0.1:0"}
        )
        self.workers = [Worker(number, shared) for number in range(settings.workers)]

    async def serve(self, stopping: asyncio.Event) -> None:
        """Run until `stopping`, then drain and stop all workers."""
        from sluice_service.pages import Pages  # noqa: PLC0415 - see there

        has_started = asyncio.Event()
        pages = Pages(self._expose, lambda: self.is_ready, lambda: "")
        await pages.start(self._settings.http)
        self.http_port = pages.port
        living = [
            asyncio.create_task(one.keep_running(has_started=has_started)) for one in self.workers
        ]
        saying = asyncio.create_task(self._say_ready(has_started))
        stop = asyncio.create_task(stopping.wait())
        try:
            # Only a stop, or a worker that cannot start, ends any of these tasks.
            await asyncio.wait({stop, *living}, return_when=asyncio.FIRST_COMPLETED)
            log.info("draining")
            await self._stop(living)
        finally:
            saying.cancel()
            stop.cancel()
            await pages.stop()
            self._port.close()
            log.info("stopped")

    async def _stop(self, living: list[asyncio.Task[None]]) -> None:
        """Drain and stop every worker. Raises OSError if one could not start."""
        for worker in self.workers:
            worker.stop()
        deadline = self._settings.drain_seconds_max + 2 * GRACE_SECONDS
        await asyncio.wait(living, timeout=deadline)
        for worker in self.workers:
            worker.kill()
        await asyncio.gather(*living)

    @property
    def is_ready(self) -> bool:
        """True while every worker serves."""
        return all(worker.http for worker in self.workers)

    async def _say_ready(self, has_started: asyncio.Event) -> None:
        while not self.is_ready and not has_started.is_set():  # noqa: ASYNC110 - of processes
            await asyncio.sleep(0.05)
        has_started.set()
        if self.is_ready:
            log.info(
                "ready",
                listen=f"{self._settings.listen.rpartition(':')[0]}:{self.grpc_port}",
                http=f"{self._settings.http.rpartition(':')[0]}:{self.http_port}",
                workers=len(self.workers),
                models=sorted(self._settings.model),
            )

    async def _expose(self, accept: str) -> tuple[bytes, str]:
        """The metrics of every worker that answers, each sample with its worker's number."""
        del accept  # workers are asked for the text format, which every scraper takes
        from sluice_service.pages import scrape  # noqa: PLC0415 - see there

        pages = await scrape([worker.http for worker in self.workers])
        return merge_pages({number: page for number, page in enumerate(pages) if page})


def _reserve(address: str) -> socket.socket:
    """A bound socket that keeps HOST:PORT for the processes that share it."""
    host, _, port = address.rpartition(":")
    family, kind, _, _, place = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    holder = socket.socket(family, kind)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(place)
    return holder


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop.

    Raises ModelError, OSError, StoreSetupError or StoreError when the server cannot start.
    """
    stopping = _stop_signal()
    if settings.workers > 1:
        await Workers(settings).serve(stopping)
        return
    await _serve(Server(settings), stopping)
