"""Through connections that break at the worst moments every output arrives, once, bit for bit."""

from pathlib import Path
from typing import Any

from tests.chaos import moments
from tests.chaos.proxy import Way
from tests.chaos.world import LIBRARY, PLAIN, THREADS, Models, Setting, World

SMALL: dict[str, Any] = {"workers": 4, "steps_max": 150}


def test_connections_may_break_at_any_moment(models: Models, tmp_path: Path) -> None:
    setting = Setting(
        "none", "off", clients=(LIBRARY, THREADS, PLAIN), holds_outputs=False, **SMALL
    )
    with World(setting, models, tmp_path, seed=1) as world:
        (server,) = world.servers
        for _ in range(3):
            moments.lose_responses(world, server)
        for way, size in [(Way.THERE, 1), (Way.BACK, 1), (Way.THERE, 700), (Way.BACK, 1500)]:
            moments.break_within_a_message(world, server, way, size)
        server.process.pause()
        server.process.proxy.cut()
        server.process.wake()
        server.process.proxy.hold(Way.THERE)
        server.process.proxy.cut()
        server.process.proxy.heal()
        moments.await_progress(world)
        verdict = world.finish()
    assert verdict.wrongs == []
    assert verdict.steps > 1000
