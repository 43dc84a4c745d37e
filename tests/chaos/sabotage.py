"""Takes one rule away from a server, in that server's process alone: the harness must notice."""

from collections.abc import Callable
from typing import Any


def forget_duplicates() -> None:
    """Apply steps again that have already been applied."""
    from sluice_service.batching.queues import Kind
    from sluice_service.batching.scheduler import Scheduler

    choose = Scheduler._drop_unrunnable

    def choose_blindly(self: Any, slots: Any) -> Any:
        queues, step = self._queues, self._table.step[slots]
        nodes = queues.head[slots]
        is_late = (queues.kind[nodes] == Kind.CHUNK) & (queues.first[nodes] < step)
        queues.first[nodes[is_late]] = step[is_late]
        return choose(self, slots)

    Scheduler._drop_unrunnable = choose_blindly


def forget_claims() -> None:
    """Write a checkpoint without checking who owns the record."""
    from sluice_service.store.sqlite import store as sqlite

    for name in ("_OWNED", "_WRITE", "_RENEW_LEASE"):
        statement = getattr(sqlite, name)
        assert "claim_id = ?" in statement
        setattr(sqlite, name, statement.replace("claim_id = ?", "claim_id != x'00' || ?"))


def forget_outputs() -> None:
    """Do not send unacknowledged outputs again."""
    from sluice_service.serving.outputs import OutputBuffer

    def forget(self: Any, stream: Any, sequence: Any, lane: int) -> None:
        sequence.held.clear()

    OutputBuffer.resend = forget


def forget_durability() -> None:
    """Send outputs of strict sequences before the store has them."""
    from sluice_service.serving.outputs import OutputBuffer

    OutputBuffer._is_gated = lambda self, outputs: None


RULES: dict[str, Callable[[], None]] = {
    "duplicates": forget_duplicates,
    "claims": forget_claims,
    "outputs": forget_outputs,
    "durability": forget_durability,
}
