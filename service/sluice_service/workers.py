"""Several server processes on one port, over a shared store, watched and shown as one."""

import asyncio
import contextlib
import multiprocessing
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import aiohttp
import structlog
import uvloop
from aiohttp import web

from sluice_model import ModelError
from sluice_service.logs import set_up_logs
from sluice_service.metrics import merge_pages
from sluice_service.pages import make_app
from sluice_service.server import GRACE_SECONDS, Server, require_free
from sluice_service.settings import Settings
from sluice_service.store import StoreError, StoreSetupError

log = structlog.get_logger()

_SCRAPE_SECONDS_MAX = 5.0
# A worker that dies at once, again and again, must not take the machine with it.
_RESTART_SECONDS = (0.1, 10.0)
_LIVED_LONG_SECONDS = 60.0


class Worker:
    """One server process, started again whenever it ends by itself."""

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        # Where its metrics are; empty while it does not serve.
        self.http = ""
        self._settings = settings
        self._process: BaseProcess | None = None
        self._is_stopping = False

    async def keep(self, *, has_started: asyncio.Event) -> None:
        """Run the process until `stop`. Raises OSError when it cannot even start."""
        wait = _RESTART_SECONDS[0]
        loop = asyncio.get_running_loop()
        while not self._is_stopping:
            started = loop.time()
            try:
                receiver = self._start()
            except OSError as error:
                # The machine has no room for it now: the others go on, and it may have later.
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
        """Start the process; where it says that it serves. Raises OSError."""
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
        """One life of the process."""
        assert self._process is not None
        # By descriptors, not in threads: a pool has fewer than there may be workers.
        await _is_readable(receiver.fileno())
        with contextlib.suppress(EOFError):
            self.http = receiver.recv()
        receiver.close()
        await _is_readable(self._process.sentinel)
        self._process.join()
        self.http = ""

    def stop(self) -> None:
        """Ask for a stop in good order."""
        self._is_stopping = True
        if self._process is not None and self._process.is_alive():
            self._process.terminate()

    def kill(self) -> None:
        """End what did not stop in time."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()


async def _is_readable(descriptor: int) -> None:
    """Wait until there is something to read, or nobody who could write it."""
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)


def work(settings: Settings, number: int, sender: "Connection[str, str]") -> None:
    """The body of a worker's process."""
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
        # Without the one who watches it a worker would hold the port for good.
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
    """Set by SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


class Workers:
    """All worker processes of one server, its port, and its pages."""

    def __init__(self, settings: Settings) -> None:
        """Check the ports; nothing runs yet. Raises OSError when one is taken."""
        require_free("listen", settings.listen)
        require_free("http", settings.http)
        self._settings = settings
        # Bound but not listening: it keeps the port for the workers, and takes no call.
        self._port = _reserve(settings.listen)
        host = settings.listen.rpartition(":")[0]
        self.grpc_port = self._port.getsockname()[1]
        self.http_port = 0
        shared = settings.model_copy(
            update={"listen": f"{host}:{self.grpc_port}", "http": "127.0.0.1:0"}
        )
        self.workers = [Worker(number, shared) for number in range(settings.workers)]

    async def serve(self, stopping: asyncio.Event) -> None:
        """Run until `stopping`, then stop all in good order."""
        has_started = asyncio.Event()
        pages = await self._show()
        living = [asyncio.create_task(one.keep(has_started=has_started)) for one in self.workers]
        saying = asyncio.create_task(self._say_ready(has_started))
        stop = asyncio.create_task(stopping.wait())
        try:
            # Nothing but a stop, or a start that failed, ends any of these.
            await asyncio.wait({stop, *living}, return_when=asyncio.FIRST_COMPLETED)
            log.info("draining")
            await self._stop(living)
        finally:
            saying.cancel()
            stop.cancel()
            await pages.cleanup()
            self._port.close()
            log.info("stopped")

    async def _stop(self, living: list[asyncio.Task[None]]) -> None:
        """Stop every worker in good order. Raises OSError where one could not start."""
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

    async def _show(self) -> web.AppRunner:
        """The pages of all workers as one."""
        runner = web.AppRunner(
            make_app(self._expose, lambda: self.is_ready, lambda: ""),
            access_log=None,
            handle_signals=False,
        )
        await runner.setup()
        host, _, port = self._settings.http.rpartition(":")
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        self.http_port = runner.addresses[0][1]
        return runner

    async def _expose(self, accept: str) -> tuple[bytes, str]:
        """Every worker's metrics, each with a label that says whose it is."""
        del accept  # workers are asked in the text format, which every scraper takes
        timeout = aiohttp.ClientTimeout(total=_SCRAPE_SECONDS_MAX)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            pages = await asyncio.gather(*(self._ask(session, one) for one in self.workers))
        return merge_pages({number: page for number, page in enumerate(pages) if page})

    async def _ask(self, session: aiohttp.ClientSession, worker: Worker) -> str:
        """A worker's page; empty where it does not answer."""
        if not worker.http:
            return ""
        try:
            async with session.get(f"http://{worker.http}/metrics") as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return ""


def _reserve(address: str) -> socket.socket:
    """A socket that holds HOST:PORT for processes that share it."""
    host, _, port = address.rpartition(":")
    family, kind, _, _, place = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    holder = socket.socket(family, kind)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(place)
    return holder


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then stop in good order.

    Raises ModelError, OSError, StoreSetupError or StoreError when the server cannot start.
    """
    stopping = _stop_signal()
    if settings.workers > 1:
        await Workers(settings).serve(stopping)
        return
    await _serve(Server(settings), stopping)
