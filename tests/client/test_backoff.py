"""How long a client backs off between two attempts."""

import grpc
import pytest

from sluice_client.transport.retry import Backoff, Loss

LOSS = Loss(grpc.StatusCode.UNAVAILABLE, "gone")


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_it_waits_longer_only_when_every_server_was_asked_once_more(
    servers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda _, ceiling: ceiling)
    backoff = Backoff(60, servers)
    waits = [backoff.after(LOSS, float(attempt)) for attempt in range(3 * servers)]
    assert waits == [wait for wait in (0.02, 0.04, 0.08) for _ in range(servers)]


def test_an_outage_of_hours_is_waited_out() -> None:
    backoff = Backoff(86_400)
    for attempt in range(5_000):
        wait = backoff.after(LOSS, float(attempt))
        assert isinstance(wait, float)
        assert wait <= 2
