"""Pipes rows of text through sequences of one model and keeps their order."""

import asyncio
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from sluice_cli.rows import CsvRows, JsonRows, RowError, Rows
from sluice_client import AsyncClient, Mode, SluiceError
from sluice_protos.contract_pb2 import ModelContract

# How many rows may have been read without their output having been written.
_AHEAD: Final = 1024


class RowFailedError(Exception):
    """A row has failed; the message names the row and the cause."""


@dataclass
class _Track:
    """One sequence: the inputs to send, and a future for each output."""

    inputs: "asyncio.Queue[dict[str, Any] | None]" = field(default_factory=asyncio.Queue)
    outputs: "deque[asyncio.Future[Any]]" = field(default_factory=deque)
    task: "asyncio.Task[None] | None" = None

    async def arrive(self) -> AsyncIterator[Any]:
        """Yield the inputs until there are no more."""
        while (x := await self.inputs.get()) is not None:
            yield x


class Pipe:
    """Sends each row to its sequence and writes the outputs in the order of the rows."""

    def __init__(self, model: str, source: str, sequence_id: str | None, key: str | None) -> None:
        self._model = model
        self._source = source
        self._sequence_id = sequence_id
        self._key = key
        self._room = threading.Semaphore(_AHEAD)
        self._tracks: dict[str, _Track] = {}
        # (row number, key, future output) for each row that was read.
        self._written: asyncio.Queue[tuple[int, str, asyncio.Future[Any]] | None] = asyncio.Queue()

    async def run(self, address: list[str], *, is_json: bool) -> None:
        """Pipe all rows. Raises RowFailedError, SluiceError, OSError."""
        async with AsyncClient(address) as client:
            contract = await client.model(self._model)
            kind = JsonRows if is_json else CsvRows
            try:
                rows: Rows = kind(contract, self._key)
            except RowError as error:
                raise RowFailedError(str(error)) from None
            reader = asyncio.create_task(self._read(client, rows))
            try:
                await self._write(rows, contract)
                await reader
                for track in self._tracks.values():
                    track.inputs.put_nowait(None)
                await asyncio.gather(*(track.task for track in self._tracks.values() if track.task))
            finally:
                tasks = [track.task for track in self._tracks.values() if track.task]
                for task in (reader, *tasks):
                    task.cancel()
                await asyncio.gather(reader, *tasks, return_exceptions=True)

    async def _read(self, client: AsyncClient, rows: Rows) -> None:
        """Read rows and pass each to its sequence."""
        loop = asyncio.get_running_loop()
        number = 0
        try:
            async for line in self._lines():
                number += 1
                output: asyncio.Future[Any] = loop.create_future()
                try:
                    _require_text(line)
                    row = rows.read(line) if line.strip() else None
                except RowError as error:
                    _refuse(output, error)
                    self._written.put_nowait((number, "", output))
                    return
                if row is None:
                    self._room.release()
                    continue
                key, x = row
                self._written.put_nowait((number, key, output))
                track = self._track(client, key)
                track.outputs.append(output)
                track.inputs.put_nowait(x)
        finally:
            self._written.put_nowait(None)

    def _track(self, client: AsyncClient, key: str) -> _Track:
        track = self._tracks.get(key)
        if track is None:
            track = self._tracks[key] = _Track()
            track.task = asyncio.create_task(self._follow(client, track, key))
        return track

    async def _follow(self, client: AsyncClient, track: _Track, key: str) -> None:
        """Stream one sequence from its open to its close or park."""
        name, mode = self._sequence_id, Mode.START
        if name is not None:
            mode = Mode.START_OR_RESUME
            name = name if self._key is None else f"{name}/{key}"
        sequence = client.sequence(self._model, name, mode=mode)
        try:
            async with sequence:
                async for y in sequence.stream(track.arrive()):
                    track.outputs.popleft().set_result(y)
                if self._sequence_id is not None:
                    await sequence.park()
        except SluiceError as error:
            if not track.outputs:
                raise
            _refuse(track.outputs.popleft(), error)

    async def _write(self, rows: Rows, contract: ModelContract) -> None:
        """Write the outputs in the order of the rows."""
        is_first = True
        while (item := await self._written.get()) is not None:
            number, key, output = item
            try:
                y = await output
            except (SluiceError, ValueError) as error:
                raise RowFailedError(f"row {number}: {error}") from None
            outputs = y if len(contract.outputs) > 1 else {contract.outputs[0].name: y}
            head = rows.head() if is_first else None
            is_first = False
            lines = [rows.write(key, outputs)] if head is None else [head, rows.write(key, outputs)]
            sys.stdout.write("".join(f"{line}\n" for line in lines))
            sys.stdout.flush()
            self._room.release()

    async def _lines(self) -> AsyncIterator[str]:
        """Yield the lines of the source. A thread reads them, because reading may block."""
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[str | Exception | None] = asyncio.Queue()

        def hand_over(line: str | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended in the meantime
                loop.call_soon_threadsafe(lines.put_nowait, line)

        def read() -> None:
            try:
                with _open(self._source) as file:
                    for line in file:
                        self._room.acquire()
                        hand_over(line)
            except Exception as error:  # report every error, so that no reader waits for ever
                hand_over(error)
            hand_over(None)

        threading.Thread(target=read, daemon=True).start()
        while (line := await lines.get()) is not None:
            if isinstance(line, Exception):
                raise line
            yield line


def _open(source: str) -> TextIO:
    """Open as UTF-8, with or without a BOM. `_require_text` finds bytes that are not UTF-8."""
    if source == "-":
        # sys.stdin itself would make Python wait at exit for the thread that reads it.
        return os.fdopen(
            sys.stdin.fileno(), encoding="utf-8-sig", errors="surrogateescape", closefd=False
        )
    return Path(source).open(encoding="utf-8-sig", errors="surrogateescape")


def _require_text(line: str) -> None:
    """Raise RowError if bytes of `line` are not UTF-8."""
    try:
        line.encode()
    except UnicodeEncodeError:
        raise RowError(
            "is not UTF-8; convert it, for example with: iconv -f latin1 -t utf-8"
        ) from None


def _refuse(output: "asyncio.Future[Any]", error: Exception) -> None:
    output.set_exception(error)
    output.exception()  # mark it as seen: an earlier row may end the command first
