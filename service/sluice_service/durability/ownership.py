"""Asks the store who may have a sequence: before it is opened, and before its end is told."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import numpy as np

from sluice_service.durability.snapshots import Snapshots
from sluice_service.errors import LaneError, NotFoundError, StoreDownError
from sluice_service.runtime.cooperative import take_turns
from sluice_service.sequences.stream import Stream
from sluice_service.sequences.table import Sequences
from sluice_service.serving.attachments import Parting
from sluice_service.serving.opening import Openings, is_blind, lost
from sluice_service.serving.run_loop import RunLoop
from sluice_service.store import (
    Checkpoint,
    ClaimRequest,
    Closing,
    Granted,
    Key,
    Store,
    Stored,
    StoreError,
    Verdict,
    unpack,
)
from sluice_service.store.claims import Claim, Durability, OpenMode, OpenRequest

Answer = Granted | LaneError | None
# The store is asked about so many opens at once.
_OPENED_AT_ONCE_MAX = 1000


class Custody:
    """What one model's host and its store say to each other about ownership."""

    def __init__(
        self,
        store: Store,
        model: str,
        sequences: Sequences,
        openings: Openings,
        snapshots: Snapshots,
        runs: RunLoop,
    ) -> None:
        self._store = store
        self._model = model
        self._sequences = sequences
        self._openings = openings
        self._snapshots = snapshots
        self._runs = runs
        self._busy: dict[str, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def exclusive(self, sequence_ids: Iterable[str]) -> AsyncIterator[None]:
        """While the store is asked about these sequences, nobody else asks about them."""
        names = set(sequence_ids)
        while others := {self._busy[name] for name in names if name in self._busy}:
            await asyncio.wait(others)
        mine = asyncio.get_running_loop().create_future()
        self._busy.update(dict.fromkeys(names, mine))
        try:
            yield
        finally:
            for name in names:
                del self._busy[name]
            mine.set_result(None)

    async def settled(self, sequence_ids: Iterable[str]) -> None:
        """Return once the store is not asked any more what it is asked now about them."""
        asked = {self._busy[name] for name in sequence_ids if name in self._busy}
        if asked:
            await asyncio.wait(asked)

    async def open_all(self, stream: Stream, requests: Iterable[OpenRequest]) -> None:
        """Open sequences on a stream; those of one message may name one twice."""
        for batch in _distinct(requests):
            admitted = [one for one in batch if self._openings.admits(stream, one)]
            await self.open(admitted, partial(self._openings.open, stream))

    async def open(
        self, requests: Sequence[OpenRequest], land: Callable[[OpenRequest, Answer], None]
    ) -> None:
        """Ask the store about opens of different sequences; `land` each with its answer.

        None is the answer for those that no store has. Lands between runs, many in turns.
        """
        kept = [one for one in requests if self._openings.durability(one) != Durability.OFF]
        async with self.exclusive(one.sequence_id for one in kept):
            answers: dict[str, Answer] = {}
            names = [one.sequence_id for one in kept]
            promised = self._openings.promised

            def land_one(request: OpenRequest) -> None:
                promised.discard(request.sequence_id)
                land(request, answers.get(request.sequence_id))

            try:
                if kept:
                    answers = dict(zip(names, await self._claim(kept), strict=True))
                await take_turns(map(land_one, requests), instant=self._runs.between_runs)
            finally:
                promised.difference_update(names)
                if kept:
                    # A place that was promised may be free after all.
                    self._sequences.on_gone()
                await self._give_back(kept, answers)

    async def _give_back(self, opens: Sequence[OpenRequest], answers: Mapping[str, Answer]) -> None:
        """End in the store what was created there and could not be opened here after all.

        A writer may have it when it asks again; any other caller would find its id taken.
        """
        closings = []
        for one in opens:
            answer = answers.get(one.sequence_id)
            if not isinstance(answer, Granted) or answer.claim is not Claim.CREATE or one.writer:
                continue
            if self._sequences.get(one.sequence_id) is None:
                key = self._key(one.sequence_id)
                closings.append(Closing(key, answer.claim_id, "it could not be opened"))
        if closings:
            with suppress(StoreError):
                await self._store.close(closings)

    async def _claim(self, opens: Sequence[OpenRequest]) -> Sequence[Granted | LaneError]:
        try:
            refused = [await self._refuse_early(one) for one in opens]
            asked = [one for one, error in zip(opens, refused, strict=True) if error is None]
            requests = await self._runs.between_runs(lambda: [self._as_claim(one) for one in asked])
            answers = iter(await self._store.claim(requests))
            return [next(answers) if error is None else error for error in refused]
        except StoreError as error:
            return [as_down(error)] * len(opens)

    async def _refuse_early(self, request: OpenRequest) -> LaneError | None:
        """Why a sequence cannot live here; where it can, a place is promised to it.

        For want of room, or because it lives at another server and its caller numbers no
        steps. A claim would end it there, or put one into the store that lives nowhere.
        """
        if self._sequences.get(request.sequence_id) is not None:
            return None
        full = self._openings.check_room()
        if full is None:
            self._openings.promised.add(request.sequence_id)
        if request.mode != OpenMode.RESUME:
            return full
        if full is None and not is_blind(request):
            return None
        # Where it lives nowhere the store says so better.
        stored = await self._store.read(self._key(request.sequence_id))
        if stored is None:
            return None
        if full is not None:
            return full
        try:
            checkpoint = unpack(stored.checkpoint.data)
        except LaneError as error:
            return error
        if not is_blind(request) or checkpoint.clean_under:
            return None
        return lost(request, checkpoint)

    def _as_claim(self, request: OpenRequest) -> ClaimRequest:
        """An open with what this process knows of its sequence."""
        sequence = self._sequences.get(request.sequence_id)
        initial = self._snapshots.initial(request)
        key = self._key(request.sequence_id)
        if sequence is None or not sequence.is_durable:
            return ClaimRequest(key, request, initial)
        is_taken = request.mode in (OpenMode.TAKEOVER, OpenMode.START_OR_RESUME)
        snapshot = None
        if is_taken and request.writer != sequence.record.writer:
            snapshot = self._snapshots.take(np.array([sequence.slot]))[0].packed
        return ClaimRequest(key, request, initial, sequence.claim_id, snapshot)

    async def close(self, partings: Sequence[Parting]) -> list[Verdict]:
        """Have the store drop sequences that end. Raises StoreError."""
        return await self._store.close(
            [
                Closing(self._key(one.sequence.sequence_id), one.claim_id, one.ending)
                for one in partings
            ]
        )

    def _key(self, sequence_id: str) -> Key:
        return Key(self._model, sequence_id)

    async def read(self, sequence_id: str) -> Checkpoint:
        """The last checkpoint of a sequence that lives elsewhere. Raises LaneError."""
        try:
            stored = await self._store.read(self._key(sequence_id))
        except StoreError as error:
            raise as_down(error) from error
        if stored is None:
            raise NotFoundError(
                f"model {self._model!r} has no live sequence {sequence_id!r}, here or in the store"
            )
        return unpack(stored.checkpoint.data)

    async def list_stored(self) -> AsyncIterator[Stored]:
        """Every live sequence that the store has of this model. Raises StoreDownError."""
        try:
            async for stored in self._store.stored(self._model):
                yield stored
        except StoreError as error:
            raise as_down(error) from error

    async def close_elsewhere(self, sequence_id: str, ending: str) -> int:
        """Drop a sequence that is not here, whoever has it; its durable steps. Raises LaneError."""
        checkpoint = await self.read(sequence_id)
        try:
            await self._store.close([Closing(self._key(sequence_id), b"", ending)])
        except StoreError as error:
            raise as_down(error) from error
        return checkpoint.step


def _distinct(requests: Iterable[OpenRequest]) -> Iterator[list[OpenRequest]]:
    """The requests in their order, cut so that none names a sequence twice."""
    batch: list[OpenRequest] = []
    names: set[str] = set()
    for request in requests:
        if request.sequence_id in names or len(batch) == _OPENED_AT_ONCE_MAX:
            yield batch
            batch, names = [], set()
        batch.append(request)
        if request.sequence_id:
            names.add(request.sequence_id)
    if batch:
        yield batch


def as_down(error: StoreError) -> StoreDownError:
    """What a client is told of it."""
    return StoreDownError(f"the store does not answer ({error}); nothing was changed, try again")
