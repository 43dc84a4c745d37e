"""What a run waits for, turn by turn of an event loop that is not there."""

from sluice_service.batching.arrivals import Arrivals


def _turns(arrivals: Arrivals, brought: int) -> int:
    """The turns waited for a run when each of the first `brought` has brought one more message."""
    arrivals.count += 1
    turns = 0
    while arrivals.may_bring_more():
        turns += 1
        arrivals.count += turns <= brought
        assert turns < 1000
    return turns


def test_more_messages_are_waited_for_only_where_waiting_has_brought_some() -> None:
    arrivals = Arrivals()
    assert _turns(arrivals, 20) > 20
    assert _turns(arrivals, 5) > 5
    # A client that has one message at a time is not kept waiting …
    assert _turns(arrivals, 0) > 0
    waited = [_turns(arrivals, 0) for _ in range(300)]
    assert sum(turns > 0 for turns in waited) < 12
    # … others are found again, and no run waits for ever.
    found = [_turns(arrivals, 500) for _ in range(100)]
    assert 500 > max(found) == found[-1] > 100
