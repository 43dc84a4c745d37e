"""Asks the store who owns a sequence: when it opens, when it ends, and to renew its lease."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import numpy as np

from sluice_service.durability.pending import BATCH_MAX
from sluice_service.durability.snapshots import Snapshots
from sluice_service.errors import LaneError, LimitError, NotFoundError, StoreDownError
from sluice_service.runtime.cooperative import take_turns
from sluice_service.sequences.lifecycle import Sequence as LiveSequence
from sluice_service.sequences.stream import Stream
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.admission import Admission
from sluice_service.serving.attachments import Departure
from sluice_service.serving.opening import Opening
from sluice_service.serving.placement import is_uncounted, lost
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
# How many opens are in one call of the store.
_OPENS_AT_ONCE_MAX = 1000


class Ownership:
    """Claims, ends and renews the durable sequences of one model in the store.

    While the store is asked about the claim or the end of a sequence, it is asked nothing else
    about that sequence. So opens and ends of one sequence never overlap.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        table: SequenceTable,
        admission: Admission,
        opening: Opening,
        snapshots: Snapshots,
        runs: RunLoop,
    ) -> None:
        self._store = store
        self._model = model
        self._table = table
        self._admission = admission
        self._opening = opening
        self._snapshots = snapshots
        self._runs = runs
        self._asked: dict[str, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def exclusive(self, sequence_ids: Iterable[str]) -> AsyncIterator[None]:
        """A block in which the store is asked nothing else about the owner of these sequences."""
        names = set(sequence_ids)
        while others := {self._asked[name] for name in names if name in self._asked}:
            await asyncio.wait(others)
        mine = asyncio.get_running_loop().create_future()
        self._asked.update(dict.fromkeys(names, mine))
        try:
            yield
        finally:
            for name in names:
                del self._asked[name]
            mine.set_result(None)

    async def answered(self, sequence_ids: Iterable[str]) -> None:
        """Return when the store has answered the current questions about these sequences."""
        asked = {self._asked[name] for name in sequence_ids if name in self._asked}
        if asked:
            await asyncio.wait(asked)

    # Opens.

    async def open_all(self, stream: Stream, requests: Iterable[OpenRequest]) -> None:
        """Take opens through all stages. The opens of one message may name a sequence twice."""
        for batch in _distinct(requests):
            admitted = [one for one in batch if self._opening.admit(stream, one)]
            await self.open(admitted, partial(self._opening.complete, stream))

    async def open(
        self, requests: Sequence[OpenRequest], complete: Callable[[OpenRequest, Answer], None]
    ) -> None:
        """Reserve and claim for admitted opens of different sequences; `complete` each of them.

        `complete` is called between runs, in short turns, with the store's answer, or with None
        for a sequence that is in no store.
        """
        durable = [one for one in requests if self._admission.durability(one) != Durability.OFF]
        names = [one.sequence_id for one in durable]
        async with self.exclusive(names):
            answers: dict[str, Answer] = {}

            def complete_one(request: OpenRequest) -> None:
                self._admission.release((request.sequence_id,))
                complete(request, answers.get(request.sequence_id))

            try:
                if durable:
                    answers = dict(zip(names, await self._claim(durable), strict=True))
                await take_turns(map(complete_one, requests), instant=self._runs.between_runs)
            finally:
                self._admission.release(names)
                if durable:
                    # Reserved room may be free again.
                    self._table.on_gone()
                await self._give_back(durable, answers)

    async def _claim(self, opens: Sequence[OpenRequest]) -> Sequence[Granted | LaneError]:
        try:
            refused = [await self._reserve(one) for one in opens]
            asked = [one for one, error in zip(opens, refused, strict=True) if error is None]
            requests = await self._runs.between_runs(lambda: [self._as_claim(one) for one in asked])
            answers = iter(await self._store.claim(requests))
            return [next(answers) if error is None else error for error in refused]
        except StoreError as error:
            return [as_down(error)] * len(opens)

    async def _reserve(self, request: OpenRequest) -> LaneError | None:
        """Reserve room for a sequence. Returns the error if it cannot live here.

        There may be no room, or it may live at another server while its caller numbers no
        steps. A claim would then end it there, or create one that lives nowhere.
        """
        if self._table.get(request.sequence_id) is not None:
            return None
        full: LimitError | None = None
        try:
            self._admission.reserve(request.sequence_id)
        except LimitError as error:
            full = error
        if request.mode != OpenMode.RESUME:
            return full
        if full is None and not is_uncounted(request):
            return None
        # If it lives nowhere, the store's answer is clearer.
        stored = await self._store.read(self._key(request.sequence_id))
        if stored is None:
            return None
        if full is not None:
            return full
        try:
            checkpoint = unpack(stored.checkpoint.data)
        except LaneError as error:
            return error
        return None if checkpoint.clean_under else lost(request, checkpoint)

    def _as_claim(self, request: OpenRequest) -> ClaimRequest:
        """An open, with what this process knows of its sequence."""
        sequence = self._table.get(request.sequence_id)
        initial = self._snapshots.initial(request)
        key = self._key(request.sequence_id)
        if sequence is None or not sequence.is_durable:
            return ClaimRequest(key, request, initial)
        is_taken = request.mode in (OpenMode.TAKEOVER, OpenMode.START_OR_RESUME)
        snapshot = None
        if is_taken and request.writer != sequence.record.writer:
            snapshot = self._snapshots.take(np.array([sequence.slot]))[0].packed
        return ClaimRequest(key, request, initial, sequence.claim_id, snapshot)

    async def _give_back(self, opens: Sequence[OpenRequest], answers: Mapping[str, Answer]) -> None:
        """End a sequence in the store that was created there but could not be opened here.

        A writer may get it with its next open. Other callers would find the id taken.
        """
        closings = []
        for one in opens:
            answer = answers.get(one.sequence_id)
            if not isinstance(answer, Granted) or answer.claim is not Claim.CREATE or one.writer:
                continue
            if self._table.get(one.sequence_id) is None:
                key = self._key(one.sequence_id)
                closings.append(Closing(key, answer.claim_id, "it could not be opened"))
        if closings:
            with suppress(StoreError):
                await self._store.close(closings)

    # Ends and leases.

    async def close(self, departures: Sequence[Departure]) -> list[Verdict]:
        """Have the store drop sequences that end. Raises StoreError."""
        return await self._store.close(
            [
                Closing(self._key(one.sequence.sequence_id), one.claim_id, one.ending)
                for one in departures
            ]
        )

    async def close_elsewhere(self, sequence_id: str, ending: str) -> int:
        """Drop a sequence that is not here, whoever owns it. Returns its durable steps.

        Raises LaneError.
        """
        checkpoint = await self.read(sequence_id)
        try:
            await self._store.close([Closing(self._key(sequence_id), b"", ending)])
        except StoreError as error:
            raise as_down(error) from error
        return checkpoint.step

    async def renew_leases(self) -> AsyncIterator[list[tuple[LiveSequence, bytes]]]:
        """Renew the leases of all durable sequences. Yields those that this process has lost.

        Each comes with the claim that was refused. Raises StoreError.
        """
        alive = [(one, one.claim_id) for one in self._table if one.is_durable]
        for start in range(0, len(alive), BATCH_MAX):
            part = alive[start : start + BATCH_MAX]
            verdicts = await self._store.renew_leases(
                [(self._key(one.sequence_id), claim_id) for one, claim_id in part]
            )
            await self.explained([one for one, _ in part], verdicts)
            pairs = zip(part, verdicts, strict=True)
            yield [pair for pair, verdict in pairs if verdict is Verdict.REFUSED]

    async def explained(
        self, sequences: Sequence[LiveSequence], verdicts: Sequence[Verdict]
    ) -> None:
        """Return when no open or end is under way that may be the cause of a refused claim."""
        await self.answered(
            one.sequence_id
            for one, verdict in zip(sequences, verdicts, strict=True)
            if verdict is Verdict.REFUSED
        )

    # Questions.

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

    def _key(self, sequence_id: str) -> Key:
        return Key(self._model, sequence_id)


def _distinct(requests: Iterable[OpenRequest]) -> Iterator[list[OpenRequest]]:
    """The requests in order, in parts of which none names a sequence twice."""
    batch: list[OpenRequest] = []
    names: set[str] = set()
    for request in requests:
        if request.sequence_id in names or len(batch) == _OPENS_AT_ONCE_MAX:
            yield batch
            batch, names = [], set()
        batch.append(request)
        if request.sequence_id:
            names.add(request.sequence_id)
    if batch:
        yield batch


def as_down(error: StoreError) -> StoreDownError:
    """The error that a client gets for it."""
    return StoreDownError(f"the store does not answer ({error}); nothing was changed, try again")
