"""Holds the served models, each with a host, which may come and go while the server runs."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from sluice_service.batching.versions import ONLY, Version, load_version
from sluice_service.errors import ModelNotFoundError
from sluice_service.metrics import Metrics
from sluice_service.models.host import Host
from sluice_service.settings import Settings
from sluice_service.store import Store

log = structlog.get_logger()


class Hosts(Mapping[str, Host]):
    """Every host by its model's name."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        store: Store | None,
        on_change: Callable[[str], Awaitable[None]],
    ) -> None:
        """`on_change(name)` is called when a model is added, changes its version, or is removed."""
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._on_change = on_change
        self._hosts: dict[str, Host] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_started = False

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def load(self, path: Path, number: int = ONLY, *, warms_up: bool = True) -> Version:
        """Load and test a file in any thread, which takes seconds. Raises ModelError."""
        version = load_version(
            path,
            number,
            threads=self._settings.run_threads,
            refuses_non_finite=self._settings.non_finite == "refuse",
        )
        if warms_up:
            version.warm_up()
        return version

    def add(self, name: str, version: Version) -> None:
        """Serve a model that was not served before."""
        metrics = self._metrics.model(name)
        # As many threads as runs at once: each has its own memory, and a larger pool would
        # start another thread for a run that comes just before the last one's thread is idle.
        threads = ThreadPoolExecutor(
            max_workers=self._settings.runs_at_once_max, thread_name_prefix=f"run-{name}"
        )
        self._threads[name] = threads
        self._hosts[name] = Host(name, version, self._settings, metrics, threads, self._store)
        self._log(name, version)
        if self._is_started:
            self._tasks[name] = asyncio.create_task(self._hosts[name].live())

    async def adopt(self, name: str, version: Version) -> None:
        """Let new sequences of a model begin on `version`. Raises ModelError."""
        if name in self._hosts:
            await self._hosts[name].adopt(version)
            self._log(name, version)
        else:
            self.add(name, version)
        await self._on_change(name)

    async def unload(self, name: str) -> None:
        """Start no new sequences of a model; it is removed when its last sequence has ended."""
        self._hosts[name].close()
        log.info("model_unloading", model=name)
        await self._on_change(name)
        await self.sweep()

    async def sweep(self) -> None:
        """Remove the models that were unloaded and have no live sequence any more."""
        for name, host in list(self._hosts.items()):
            await host.sweep()
            if host.is_deserted and self._hosts.get(name) is host:
                # Remove everything that belongs to it before the first await, because the model
                # may be loaded again meanwhile.
                del self._hosts[name]
                task, threads = self._tasks.pop(name, None), self._threads.pop(name)
                self._metrics.forget(name)
                await host.drain()
                if task is not None:
                    task.cancel()
                threads.shutdown(wait=False)
                log.info("model_unloaded", model=name)
                await self._on_change(name)

    def activity(self) -> dict[str, tuple[float, int]]:
        """The runs so far and the live sequences of each model: equal while nothing happens."""
        return {name: host.activity for name, host in self.items()}

    def start(self) -> None:
        """Start the background tasks of all hosts."""
        self._is_started = True
        for name, host in self._hosts.items():
            self._tasks[name] = asyncio.create_task(host.live())

    async def drain(self) -> None:
        """Drain all hosts."""
        await asyncio.gather(*(host.drain() for host in self._hosts.values()))

    def stop(self) -> None:
        """Cancel all background tasks."""
        for task in self._tasks.values():
            task.cancel()
        for threads in self._threads.values():
            threads.shutdown(wait=False)

    def _log(self, name: str, version: Version) -> None:
        self._metrics.load_seconds.labels(name).set(version.seconds)
        log.info(
            "model_loaded",
            model=name,
            version=version.number,
            path=str(version.path),
            digest=version.digest[:12],
            is_bit_exact=version.self_test.is_bit_exact,
            arithmetic=version.arithmetic[:12],
            seconds=round(version.seconds, 3),
        )


def find_host(hosts: Mapping[str, Host], name: str) -> Host:
    """The host of that model. Raises ModelNotFoundError, which lists the served models."""
    host = hosts.get(name)
    if host is None:
        raise ModelNotFoundError(
            f"no model {name!r} is served here; there are: {', '.join(sorted(hosts)) or 'none'}"
        )
    return host
