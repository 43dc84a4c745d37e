"""Follows a folder of models, DIR/name/version/model.onnx: what it contains and what is served."""

import asyncio
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import structlog

from sluice_model import ModelError
from sluice_service.batching.versions import Version
from sluice_service.errors import ModelNotFoundError, RepositoryError
from sluice_service.metrics import Metrics
from sluice_service.models.registry import Hosts
from sluice_service.settings import Settings

log = structlog.get_logger()

FILE = "model.onnx"
_SWEEP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Stamp:
    """Identifies the content of a file, so that a replacement is noticed."""

    inode: int
    bytes: int
    changed: int  # nanoseconds


Found = dict[str, dict[int, Stamp]]  # by model, by version


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of one model, as the repository index lists it."""

    name: str
    version: int
    state: str  # READY, LOADING, UNLOADING or UNAVAILABLE
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Refused:
    """A file that could not be served."""

    stamp: Stamp
    reason: str


def scan(folder: Path) -> Found:
    """The versions in `folder`. Raises OSError when it cannot be read."""
    found: Found = {}
    for model in sorted(folder.iterdir()):
        if model.name.startswith(".") or not model.is_dir():
            continue
        found[model.name] = {}
        for version in model.iterdir():
            # 2, but not 02: each version has one name.
            if version.name.isdecimal() and version.name == str(int(version.name) or ""):
                try:
                    file = (version / FILE).stat()
                except OSError:
                    continue
                stamp = Stamp(file.st_ino, file.st_size, file.st_mtime_ns)
                found[model.name][int(version.name)] = stamp
    return found


class Repository:
    """The models of one folder, each in the highest version that can be served."""

    def __init__(self, folder: Path, settings: Settings, hosts: Hosts, metrics: Metrics) -> None:
        self._folder = folder
        self._control = settings.model_control
        self._poll_seconds = settings.repository_poll_seconds
        self._fixed = frozenset(settings.model)
        self._hosts = hosts
        self._metrics = metrics
        self._found: Found = {}
        self._refused: dict[tuple[str, int], _Refused] = {}
        self._served: dict[str, tuple[int, Stamp]] = {}
        self._loading: tuple[str, int] | None = None
        # Each change holds it, so that there is only one at a time.
        self._lock = asyncio.Lock()

    def open(self, threads: Executor) -> Iterator[tuple[str, Version]]:
        """Begin to load the models in `threads`, unless clients load them. Returns the models.

        Before the server starts. Raises ModelError when no version of a model can be served.
        """
        try:
            self._found = scan(self._folder)
        except OSError as error:
            raise ModelError(f"--model-repository {self._folder}: {error.strerror}") from error
        names = [] if self._control == "explicit" else list(self._found)
        if taken := self._fixed.intersection(names):
            raise ModelError(
                f"model {min(taken)!r} is named with --model and lies in the repository too; "
                "rename one of them"
            )
        newest = zip(names, threads.map(self._load_newest, names), strict=True)
        return ((name, version) for name, version in newest if version is not None)

    def serve(self, models: Iterable[tuple[str, Version]]) -> None:
        """Warm up the models that `open` has loaded and serve them, or lower versions of them.

        Before the server starts. Raises ModelError when no version of a model can be served.
        """
        for name, loaded in models:
            version: Version | None = loaded
            try:
                loaded.warm_up()
            except ModelError as error:
                self._refuse(name, loaded.number, error)
                version = self._load_newest(name, warms_up=True)
            if version is not None:
                self._hosts.add(name, version)

    def _load_newest(self, name: str, *, warms_up: bool = False) -> Version | None:
        """The highest version that can be served; None for a folder without versions."""
        for number in self._candidates(name):
            if (name, number) in self._refused:
                continue
            try:
                version = self._hosts.load(self._path(name, number), number, warms_up=warms_up)
            except ModelError as error:
                self._refuse(name, number, error)
            else:
                self._served[name] = number, self._found[name][number]
                return version
        if self._found[name]:
            raise ModelError(self._refused[name, max(self._found[name])].reason)
        return None

    async def live(self) -> None:
        """Follow the folder, if the settings say so, until cancelled."""
        is_polling = self._control == "poll"
        while True:
            await asyncio.sleep(self._poll_seconds if is_polling else _SWEEP_SECONDS)
            try:
                if is_polling:
                    await self.look()
                await self._hosts.sweep()
            except OSError as error:
                log.warning("repository_unreadable", path=str(self._folder), error=str(error))
            except Exception:
                # A defect of the server must not end the task: read the folder again.
                log.exception("repository_broke")

    async def look(self) -> None:
        """Read the folder, and load, adopt and unload what has changed. Raises OSError."""
        async with self._lock:
            self._found = await asyncio.to_thread(scan, self._folder)
            for name, versions in self._found.items():
                if versions:
                    await self._follow(name)
            self._refused = {
                (name, number): refused
                for (name, number), refused in self._refused.items()
                if number in self._found.get(name, ())
            }
            for name in [name for name in self._served if not self._found.get(name)]:
                del self._served[name]
                await self._hosts.unload(name)
            await self._hosts.sweep()

    async def load(self, name: str) -> None:
        """Load a model's newest version for a client.

        Raises RepositoryError where that is not for clients or the file cannot be served,
        ModelNotFoundError where there is none.
        """
        self._require_explicit()
        async with self._lock:
            self._found = await asyncio.to_thread(scan, self._folder)
            if not self._found.get(name):
                raise ModelNotFoundError(
                    f"the repository has no model {name!r}; put it there as {name}/1/{FILE}"
                )
            newest = max(self._found[name])
            self._refused.pop((name, newest), None)
            await self._follow(name)
            if (refused := self._refused.get((name, newest))) is not None:
                raise RepositoryError(refused.reason)

    async def unload(self, name: str) -> None:
        """Unload a model for a client. Its live sequences continue until they end.

        Raises RepositoryError where that is not for clients, ModelNotFoundError where there
        is none.
        """
        self._require_explicit()
        async with self._lock:
            if self._served.pop(name, None) is None:
                raise ModelNotFoundError(f"no model {name!r} of the repository is loaded")
            await self._hosts.unload(name)

    def entries(self) -> Iterator[Entry]:
        """The versions in the folder that are not served, with the reason, also bad new files."""
        loaded = {name: [v.number for v in host.versions] for name, host in self._hosts.items()}
        for name, versions in self._found.items():
            for number in versions:
                refused = self._refused.get((name, number))
                if (name, number) == self._loading:
                    yield Entry(name, number, "LOADING")
                elif refused is not None:
                    yield Entry(name, number, "UNAVAILABLE", refused.reason)
                elif number in loaded.get(name, ()):
                    continue
                elif name in self._served:
                    reason = f"version {self._served[name][0]} is served"
                    yield Entry(name, number, "UNAVAILABLE", reason)
                else:
                    yield Entry(name, number, "UNAVAILABLE", "it is not loaded")

    async def _follow(self, name: str) -> None:
        """Adopt the highest version that can be served, unless it is served already."""
        versions = self._found[name]
        for number in self._candidates(name):
            served = self._served.get(name)
            if served == (number, versions[number]):
                return
            if served is not None and number < served[0] and served[0] in versions:
                return  # A higher version is served, even if its file is bad by now.
            refused = self._refused.get((name, number))
            if refused is not None and refused.stamp == versions[number]:
                continue
            self._loading = name, number
            try:
                if name in self._fixed:
                    raise ModelError(f"model {name!r} is named with --model; rename one of them")
                path = self._path(name, number)
                version = await asyncio.to_thread(self._hosts.load, path, number)
                await self._hosts.adopt(name, version)
            except ModelError as error:
                self._refuse(name, number, error)
            else:
                self._refused.pop((name, number), None)
                self._served[name] = number, versions[number]
                return
            finally:
                self._loading = None

    def _refuse(self, name: str, number: int, error: ModelError) -> None:
        """Record and log that a file cannot be served; it is tried again when it changes."""
        self._refused[name, number] = _Refused(self._found[name][number], str(error))
        self._metrics.load_failures.labels(name).inc()
        log.error("model_refused", model=name, version=number, error=str(error))

    def _candidates(self, name: str) -> list[int]:
        return sorted(self._found[name], reverse=True)

    def _path(self, name: str, number: int) -> Path:
        return self._folder / name / str(number) / FILE

    def _require_explicit(self) -> None:
        if self._control != "explicit":
            raise RepositoryError(
                "clients may not load and unload models here; serve with --model-control explicit"
            )
