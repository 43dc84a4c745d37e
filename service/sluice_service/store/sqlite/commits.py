"""Group commit: calls that come while one transaction is written share the next one."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeAlias, TypeVar

from sluice_service.store.protocol import StoreError
from sluice_service.store.sqlite.file import SqliteFile, Transaction

Answer = TypeVar("Answer")


class _Job(Generic[Answer]):
    """One call that waits for the thread."""

    __slots__ = ("answer", "future", "is_writing", "work")

    def __init__(self, work: Callable[[Transaction], Answer], *, is_writing: bool) -> None:
        self.work = work
        self.is_writing = is_writing
        self.future: Future[Answer] = Future()
        self.answer: Answer | None = None


_Jobs: TypeAlias = queue.SimpleQueue[_Job[Any] | None]


class Commits:
    """The thread that alone uses the file, and its queue of calls."""

    def __init__(
        self, file: SqliteFile, chore: Callable[[Transaction], object], *, chore_seconds: float
    ) -> None:
        """`chore` runs every `chore_seconds`, also under load."""
        self._file = file
        self._chore = chore
        self._chore_seconds = chore_seconds
        self._jobs = _Jobs()
        self._thread: threading.Thread | None = None

    async def start(self) -> list[str]:
        """Start the thread and open the file there; return warnings for the operator."""
        opened: Future[list[str]] = Future()
        jobs = _Jobs()
        thread = threading.Thread(
            target=self._run, args=(opened, jobs), name="sqlite-store", daemon=True
        )
        thread.start()
        try:
            warnings = await asyncio.wrap_future(opened)
        except BaseException:
            jobs.put(None)
            raise
        self._thread, self._jobs = thread, jobs
        return warnings

    async def stop(self) -> None:
        """Finish the calls that wait, and close the file."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._jobs.put(None)
            await asyncio.to_thread(thread.join)

    async def write(self, work: Callable[[Transaction], Answer]) -> Answer:
        """Run `work` in a transaction; return its result once it is durable. Raises StoreError."""
        return await self._ask(_Job(work, is_writing=True))

    async def read(self, work: Callable[[Transaction], Answer]) -> Answer:
        """Run `work`, which only reads; return its result. Raises StoreError."""
        return await self._ask(_Job(work, is_writing=False))

    async def _ask(self, job: _Job[Answer]) -> Answer:
        if self._thread is None:
            raise StoreError(f"the SQLite store {self._file.path} is not open")
        self._jobs.put(job)
        return await asyncio.wrap_future(job.future)

    # The methods below run in the thread.

    def _run(self, opened: "Future[list[str]]", jobs: _Jobs) -> None:
        try:
            opened.set_result(self._file.create())
        except BaseException as error:
            opened.set_exception(error)
            return
        chore_at = time.monotonic() + self._chore_seconds
        is_open = True
        while is_open:
            some, is_open = _take(jobs, max(0.0, chore_at - time.monotonic()))
            if time.monotonic() >= chore_at:
                chore_at = time.monotonic() + self._chore_seconds
                some.append(_Job(self._chore, is_writing=True))
            self._work(some)
        self._file.close()

    def _work(self, jobs: list[_Job[Any]]) -> None:
        writing = [job for job in jobs if job.is_writing]
        if writing and not self._commit(writing) and len(writing) > 1:
            # One of them fails: give each a transaction of its own, so that the others succeed.
            for job in writing:
                self._commit([job])
        for job in jobs:
            if not job.is_writing:
                self._commit([job])

    def _commit(self, jobs: list[_Job[Any]]) -> bool:
        """Do the jobs in one transaction. False: one of several failed, and none is answered."""
        try:
            with self._file.transaction(is_writing=jobs[0].is_writing) as transaction:
                for job in jobs:
                    job.answer = job.work(transaction)
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, StoreError):
                return False
            for job in jobs:
                job.future.set_exception(error)
            return True
        for job in jobs:
            job.future.set_result(job.answer)
        return True


def _take(jobs: _Jobs, seconds: float) -> tuple[list[_Job[Any]], bool]:
    """The jobs that wait, or the first that comes within `seconds`; False once it stops."""
    taken = list[_Job[Any]]()
    try:
        job = jobs.get(timeout=seconds)
        while job is not None:
            if job.future.set_running_or_notify_cancel():
                taken.append(job)
            job = jobs.get_nowait()
    except queue.Empty:
        return taken, True
    return taken, False
