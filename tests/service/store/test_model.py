"""Any schedule of opens, writes, closes and pauses, on handles of one store and a plain model."""

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from sluice_service.errors import ConflictError, StaleError
from sluice_service.store import (
    ClaimRequest,
    Closing,
    Granted,
    Packed,
    Stored,
    Verdict,
    Write,
)
from sluice_service.store.claims import Claim, OpenMode
from tests.service.store.conftest import make_place
from tests.service.store.places import RECORD_SECONDS, TOMBSTONE_SECONDS, Place, ask, key
from tests.service.store.test_table import CLAIMS, REFUSALS
from tests.service.test_claims import ANONYMOUS, FREE, TABLE

NAMES = ("a", "b")
WRITERS = (b"", b"me", b"you")
PROCESSES = 2


@dataclass
class Modelled:
    """What a sequence is, in the plainest words."""

    writer: bytes
    attempt: int
    epoch: int
    claim_id: bytes
    step: int
    data: bytes
    expires: float
    is_alive: bool = True


class StoreMachine(RuleBasedStateMachine):
    """Two processes with a handle each, and what they remember."""

    kind: str
    redis_url: str

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._loop = asyncio.new_event_loop()
        self._place: Place = make_place(self.kind, Path(self._folder.name), self.redis_url)
        self._handles = [self._run(self._place.open()) for _ in range(PROCESSES)]
        self._model: dict[str, Modelled] = {}
        self._epoch = 0
        self._now = 0.0
        self._count = 0
        # What each process has in memory, by name; and every claim there ever was.
        self._held: list[dict[str, bytes]] = [{} for _ in range(PROCESSES)]
        self._claims: dict[str, list[bytes]] = {name: [] for name in NAMES}
        self._last: tuple[int, ClaimRequest, Granted] | None = None

    def teardown(self) -> None:
        self._run(self._place.leave())
        self._loop.close()
        self._folder.cleanup()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def _found(self, name: str) -> Modelled | None:
        found = self._model.get(name)
        return found if found is not None and found.expires > self._now else None

    def _bytes(self) -> bytes:
        self._count += 1
        return b"%d" % self._count

    # Opens.

    @rule(
        process=st.integers(0, PROCESSES - 1),
        name=st.sampled_from(NAMES),
        mode=st.sampled_from(OpenMode),
        writer=st.sampled_from(WRITERS),
        attempt=st.integers(0, 3),
        is_epoch_right=st.booleans(),
        has_memory=st.booleans(),
        ahead=st.integers(-2, 3),
    )
    def open(self, process, name, mode, writer, attempt, is_epoch_right, has_memory, ahead) -> None:
        found = self._found(name)
        epoch = found.epoch if found is not None else 0
        held = self._held[process].get(name, b"") if has_memory else b""
        memory = max(0, (found.step if found is not None else 0) + ahead)
        request = ask(
            name,
            mode,
            writer,
            attempt=attempt,
            epoch=epoch if is_epoch_right else epoch + 1,
            initial=Packed(0, self._bytes()),
            held=held,
            snapshot=Packed(memory, self._bytes()) if held else None,
        )
        (answer,) = self._run(self._handles[process].claim([request]))
        word = self._word(found, request)
        if word in REFUSALS:
            assert type(answer) is REFUSALS[word]
        elif word == "stale":
            assert type(answer) is StaleError
        elif word == "conflict":
            assert type(answer) is ConflictError
            assert answer.epoch == epoch
        else:
            assert answer == self._grant(found, request, CLAIMS[word][0])
            self._held[process][name] = answer.claim_id
            self._claims[name].append(answer.claim_id)
            self._last = (process, request, answer)

    def _word(self, found: Modelled | None, request: ClaimRequest) -> str:
        """What the table of the protocol says of an open, in its own words."""
        wanted = request.open
        if found is None:
            situation = "unknown"
        else:
            whose = "mine" if found.writer == wanted.writer else "theirs"
            situation = f"{whose} {'alive' if found.is_alive else 'closed'}"
            if whose == "mine" and wanted.attempt < found.attempt:
                return "stale"
        row = ("mine alive", "theirs alive", "mine closed", "theirs closed", "unknown")
        entry = TABLE[wanted.mode][row.index(situation)]
        if not wanted.writer:
            entry = {**ANONYMOUS, **FREE}.get((wanted.mode, situation), entry)
        word, needs_epoch, _ = entry.partition(" if")
        epoch = found.epoch if found is not None else 0
        return "conflict" if needs_epoch and wanted.expected_epoch != epoch else word

    def _grant(self, found: Modelled | None, request: ClaimRequest, claim: Claim) -> Granted:
        """Do a claim to the model; what the store must answer."""
        is_held = (
            found is not None
            and found.is_alive
            and found.claim_id == request.held
            and request.snapshot is not None
            and (claim is Claim.WIPE or request.snapshot.step >= found.step)
        )
        checkpoint = request.initial
        if found is not None and claim in (Claim.RESUME, Claim.TAKE):
            checkpoint = Packed(found.step, found.data)
            if is_held and claim is Claim.TAKE and request.snapshot is not None:
                checkpoint = request.snapshot
        if claim is not Claim.RESUME or not is_held:
            self._epoch += 1
        epoch = self._epoch if claim is not Claim.RESUME or not is_held else found.epoch
        previous = found.claim_id if found is not None else b""
        self._model[request.key.sequence_id] = Modelled(
            writer=request.open.writer,
            attempt=request.open.attempt,
            epoch=epoch,
            claim_id=request.claim_id,
            step=checkpoint.step,
            data=checkpoint.data,
            expires=self._now + RECORD_SECONDS,
        )
        return Granted(claim, request.claim_id, epoch, is_held, previous, checkpoint)

    @rule()
    def ask_again(self) -> None:
        """The answer to a claim got lost, and nothing has happened since."""
        if self._last is not None:
            process, request, answer = self._last
            found = self._found(request.key.sequence_id)
            assert found is not None
            assert self._run(self._handles[process].claim([request])) == [answer]
            found.expires = self._now + RECORD_SECONDS

    # What follows an open. Any claim may come late.

    @rule(
        process=st.integers(0, PROCESSES - 1),
        name=st.sampled_from(NAMES),
        age=st.integers(0, 3),
        ahead=st.integers(-2, 3),
    )
    def write(self, process, name, age, ahead) -> None:
        found, claim_id = self._found(name), self._claim(name, age)
        checkpoint = Packed(max(0, (found.step if found else 0) + ahead), self._bytes())
        verdicts = self._run(self._handles[process].write([Write(key(name), claim_id, checkpoint)]))
        is_owner = found is not None and found.is_alive and found.claim_id == claim_id
        assert verdicts == [Verdict.DONE if is_owner else Verdict.REFUSED]
        if is_owner and checkpoint.step >= found.step:
            found.step, found.data = checkpoint.step, checkpoint.data
            self._last = None

    @rule(
        process=st.integers(0, PROCESSES - 1),
        name=st.sampled_from(NAMES),
        age=st.integers(-1, 3),
    )
    def close(self, process, name, age) -> None:
        found, claim_id = self._found(name), self._claim(name, age) if age >= 0 else b""
        verdicts = self._run(self._handles[process].close([Closing(key(name), claim_id, "x")]))
        is_closed = found is not None and found.is_alive and claim_id in (b"", found.claim_id)
        is_repeat = found is not None and not found.is_alive and claim_id == found.claim_id
        assert verdicts == [Verdict.DONE if is_closed or is_repeat else Verdict.REFUSED]
        if is_closed:
            found.is_alive = False
            found.expires = self._now + TOMBSTONE_SECONDS
            self._last = None

    @rule(
        process=st.integers(0, PROCESSES - 1),
        name=st.sampled_from(NAMES),
        age=st.integers(0, 3),
    )
    def renew(self, process, name, age) -> None:
        found, claim_id = self._found(name), self._claim(name, age)
        verdicts = self._run(self._handles[process].renew_leases([(key(name), claim_id)]))
        is_owner = found is not None and found.is_alive and found.claim_id == claim_id
        assert verdicts == [Verdict.DONE if is_owner else Verdict.REFUSED]
        if is_owner:
            found.expires = self._now + RECORD_SECONDS

    def _claim(self, name: str, age: int) -> bytes:
        """The claim that was granted so many claims ago; or one that never was."""
        claims = self._claims[name]
        return claims[-1 - age] if age < len(claims) else b"never claimed ..."

    # What happens to processes and to time.

    @rule(process=st.integers(0, PROCESSES - 1))
    def restart(self, process) -> None:
        """A process is killed; its successor remembers nothing."""
        self._held[process] = {}
        self._handles[process] = self._run(self._place.open())

    @rule(part=st.sampled_from([0.06, 0.6]))
    def pass_time(self, part) -> None:
        """Never to the second of an end: Redis counts the test's own seconds too."""
        seconds = RECORD_SECONDS * part
        self._run(self._place.pass_time(seconds))
        self._now += seconds
        self._last = None

    @invariant()
    def the_store_has_what_the_model_has(self) -> None:
        live = {
            name: Stored(key(name), found.epoch, Packed(found.step, found.data))
            for name in NAMES
            if (found := self._found(name)) is not None and found.is_alive
        }
        for handle in self._handles:
            for name in NAMES:
                assert self._run(handle.read(key(name))) == live.get(name)
        listed = self._run(self._list())
        assert {each.key.sequence_id: each for each in listed} == {
            name: replace(stored, checkpoint=Packed(stored.checkpoint.step, b""))
            for name, stored in live.items()
        }

    async def _list(self) -> list[Stored]:
        return [found async for found in self._handles[-1].stored("m")]


@pytest.mark.parametrize(("kind", "examples"), [("memory", 60), ("sqlite", 20), ("redis", 20)])
def test_no_schedule_leads_a_store_away_from_the_rules(kind, examples, redis_url) -> None:
    machine = type("Machine", (StoreMachine,), {"kind": kind, "redis_url": redis_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
