"""Group commit: what is asked while one transaction is written goes into the next, together."""

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
    """One call, waiting for its turn in the thread."""

    __slots__ = ("answer", "future", "is_writing", "work")

    def __init__(self, work: Callable[[Transaction], Answer], *, is_writing: bool) -> None:
        self.work = work
        self.is_writing = is_writing
        self.future: Future[Answer] = Future()
        self.answer: Answer | None = None


_Jobs: TypeAlias = queue.SimpleQueue[_Job[Any] | None]


class Commits:
    """The one thread that has the file."""

    def __init__(
        self, file: SqliteFile, chore: Callable[[Transaction], object], *, chore_seconds: float
    ) -> None:
        """`chore` is done every so many seconds, whatever else there is to do."""
        self._file = file
        self._chore = chore
        self._chore_seconds = chore_seconds
        self._jobs = _Jobs()
        self._thread: threading.Thread | None = None

    async def start(self) -> list[str]:
        """Open the file in a thread of its own; warnings for the operator."""
        opened: Future[list[str]] = Future()
        jobs = _Jobs()
        thread = threading.Thread(
            target=self._live, args=(opened, jobs), name="sqlite-store", daemon=True
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
        """Finish what is asked and close the file."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._jobs.put(None)
            await asyncio.to_thread(thread.join)

    async def write(self, work: Callable[[Transaction], Answer]) -> Answer:
        """The answer of `work` once it is durable. Raises StoreError."""
        return await self._ask(_Job(work, is_writing=True))

    async def read(self, work: Callable[[Transaction], Answer]) -> Answer:
        """The answer of `work`, which changes nothing. Raises StoreError."""
        return await self._ask(_Job(work, is_writing=False))

    async def _ask(self, job: _Job[Answer]) -> Answer:
        if self._thread is None:
            raise StoreError(f"the SQLite store {self._file.path} is not open")
        self._jobs.put(job)
        return await asyncio.wrap_future(job.future)

    # In the thread.

    def _live(self, opened: "Future[list[str]]", jobs: _Jobs) -> None:
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
            # One of them cannot be done; the others are not to suffer for it.
            for job in writing:
                self._commit([job])
        for job in jobs:
            if not job.is_writing:
                self._commit([job])

    def _commit(self, jobs: list[_Job[Any]]) -> bool:
        """Do the jobs in one transaction. False: one of several broke, and none is answered."""
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
    """All that waits, or what comes first within so many seconds; whether more may come."""
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
