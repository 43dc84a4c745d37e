"""Everything the harness does to a world: each fault begins, lasts a drawn while, and ends.

Where a fault has landed in a server's work is read from the server's trace at that very
instant: what was applied and not responded, responded and in no checkpoint, in a
checkpoint that was not durable.
"""

import contextlib
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from resource import RLIM_INFINITY, RLIMIT_FSIZE, prlimit

from tests.chaos.instants import Instant, Refusal
from tests.chaos.proxy import Proxy, Way
from tests.chaos.world import Client, Server, World

GAPS = ("apply and respond", "respond and checkpoint", "checkpoint and durable")


@dataclass
class Ledger:
    """What was done, and where it landed."""

    is_durable: bool
    faults: Counter[str] = field(default_factory=Counter)
    landings: Counter[str] = field(default_factory=Counter)
    # What must not happen to a process, whatever its sequences do.
    wrongs: list[str] = field(default_factory=list)
    diary: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _begun: float = field(default_factory=time.monotonic)

    def note(
        self,
        kind: str,
        *,
        where: str = "",
        server: Server | None = None,
        gaps: frozenset[str] | set[str] = frozenset(),
    ) -> None:
        """A fault of this kind has just begun, at `server` where it has disturbed one."""
        gaps = landed_in(server) if server is not None else set(gaps)
        if not self.is_durable:
            gaps &= {GAPS[0]}
        with self._lock:
            self.faults[kind] += 1
            self.landings.update(gaps)
            seconds = time.monotonic() - self._begun
            between = f" between {', '.join(sorted(gaps))}" if gaps else ""
            self.diary.append(f"{seconds:8.3f} {kind} {where}{between}".rstrip())

    def remark(self, words: str) -> None:
        """Something for whoever reads the diary."""
        with self._lock:
            self.diary.append(f"{time.monotonic() - self._begun:8.3f} {words}")

    def complain(self, words: str) -> None:
        """Something is wrong."""
        with self._lock:
            self.wrongs.append(words)


def landed_in(server: Server) -> set[str]:
    """The gaps of which some sequence of a server has steps in it now."""
    gaps = set()
    for _, at in server.trace.progress():
        if at.applied > at.responded:
            gaps.add(GAPS[0])
        if at.responded > at.checkpointed:
            gaps.add(GAPS[1])
        if at.checkpointed > at.durable:
            gaps.add(GAPS[2])
    return gaps


@dataclass(frozen=True)
class Scene:
    """What a fault works on."""

    world: World
    ledger: Ledger
    draw: random.Random

    def last(self, seconds_max: float) -> None:
        """Let a fault last for a while."""
        time.sleep(self.draw.uniform(0, seconds_max))

    def server(self) -> Server:
        """One of the servers."""
        return self.draw.choice(self.world.servers)

    def client(self) -> Client:
        """One of the clients."""
        return self.draw.choice(self.world.clients)


Fault = Callable[[Scene], None]


# The network between clients and servers.


def cut_connections(scene: Scene) -> None:
    server = scene.server()
    if server.process.proxy.cut(scene.draw.choice([None, 1])):
        scene.ledger.note("connection cut", server=server)


def truncate_messages(scene: Scene) -> None:
    server, way = scene.server(), scene.draw.choice(list(Way))
    server.process.proxy.cut_after(way, scene.draw.randint(1, 4000))
    scene.ledger.note("bytes truncated", where=way.value, server=server)


def strand_connections(scene: Scene) -> None:
    """What is connected is so no more, and nobody is told: pings have to find out."""
    server = scene.server()
    if server.process.proxy.strand():
        scene.ledger.note("half-open", where="for good", server=server)


def hold_bytes(scene: Scene) -> None:
    """A connection that looks alive and is not, until it is found out or comes back."""
    server = scene.server()
    proxy = server.process.proxy
    ways = scene.draw.choice([(Way.THERE,), (Way.BACK,), (Way.THERE, Way.BACK)])
    proxy.hold(*ways)
    scene.ledger.note("half-open", where="+".join(way.value for way in ways), server=server)
    scene.last(1.5)
    if scene.draw.random() < 0.7:
        proxy.cut()
    proxy.heal()


def delay_bytes(scene: Scene) -> None:
    server = scene.server()
    server.process.proxy.delay(scene.draw.uniform(0.005, 0.15))
    scene.ledger.note("delayed", server=server)
    scene.last(1.5)
    server.process.proxy.heal()


def refuse_connections(scene: Scene) -> None:
    server = scene.server()
    server.process.proxy.refuse()
    scene.ledger.note("connections refused", server=server)
    scene.last(1.0)
    server.process.proxy.heal()


# Servers.


def pause_server(scene: Scene) -> None:
    server = scene.server()
    with server.lock:
        server.process.pause()
        scene.ledger.note("server paused", server=server)
        if scene.draw.random() < 0.5:
            # Its clients go elsewhere, where there is an elsewhere; it wakes up a stranger.
            server.process.proxy.refuse()
        scene.last(2.0)
        server.process.wake()
        scene.last(0.2)
        server.process.proxy.heal()


def kill_server(scene: Scene) -> None:
    """By SIGKILL from outside, at whatever it is doing."""
    server = scene.server()
    with server.lock:
        server.process.kill()
        scene.ledger.note("server killed", server=server)
        scene.last(0.5)
        server.process.start()


def trap_server(scene: Scene) -> None:
    """By its own hand, at an instant that was chosen."""
    server = scene.server()
    instant = scene.draw.choice(list(Instant))
    is_kill = scene.draw.random() < 0.6
    number = signal.SIGKILL if is_kill else signal.SIGSTOP
    with server.lock:
        server.trace.arm(instant, scene.draw.randint(1, 20), number)
        deadline = time.monotonic() + 3
        while server.trace.is_armed and time.monotonic() < deadline:
            time.sleep(0.002)
        if server.trace.disarm():
            return  # nobody came by
        where = f"at {instant.name.lower()}"
        if is_kill:
            server.process.kill()
            scene.ledger.note("server killed", where=where, server=server)
            scene.last(0.3)
            server.process.start()
        else:
            scene.ledger.note("server paused", where=where, server=server)
            if scene.draw.random() < 0.5:
                server.process.proxy.refuse()
            scene.last(1.5)
            server.process.wake()
            server.process.proxy.heal()


def roll_servers(scene: Scene) -> None:
    """A rolling restart: one after another ends by SIGTERM and is started again."""
    for number, server in enumerate(scene.world.servers):
        with server.lock:
            scene.ledger.note("server drained", where=str(number), server=server)
            code = server.process.stop()
            if code != 0:
                scene.ledger.complain(f"server {number} ended with {code} after SIGTERM")
            server.process.start()


def kill_worker(scene: Scene) -> None:
    """One of the processes that share a server's port; its watcher starts another."""
    server = scene.server()
    with server.lock:
        worker = scene.draw.choice(server.process.workers() or [0])
        if worker:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            scene.ledger.note("worker killed")


def pause_worker(scene: Scene) -> None:
    server = scene.server()
    with server.lock:
        worker = scene.draw.choice(server.process.workers() or [0])
        if worker:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGSTOP)
                scene.ledger.note("worker paused")
                if scene.draw.random() < 0.5:
                    server.process.proxy.cut()
                scene.last(1.5)
                os.kill(worker, signal.SIGCONT)


def jump_clock(scene: Scene) -> None:
    server = scene.server()
    server.trace.jump_clock(scene.draw.choice([-86_400, -60, 60, 3_600]))
    scene.ledger.note("clock jumped", server=server)
    scene.last(1.5)
    server.trace.jump_clock(0)


# The store.


def slow_store(scene: Scene) -> None:
    server = scene.server()
    server.trace.slow_store(scene.draw.uniform(0.05, 0.6))
    scene.ledger.note("store slow", server=server)
    scene.last(2.0)
    server.trace.slow_store(0)


def refuse_store(scene: Scene) -> None:
    server = scene.server()
    refusal = scene.draw.choice([Refusal.BEFORE, Refusal.AFTER])
    server.trace.refuse_store(refusal)
    scene.ledger.note("store refusing", where=refusal.name.lower(), server=server)
    scene.last(2.0)
    server.trace.refuse_store(Refusal.NONE)


def fill_disk(scene: Scene) -> None:
    """No file of the store's process may grow, and hardly one be written."""
    world, server = scene.world, scene.server()
    if world.redis is not None:
        with world.store_lock:
            size = scene.draw.choice([0, 4096])
            prlimit(world.redis.pid, RLIMIT_FSIZE, (size, RLIM_INFINITY))
            scene.ledger.note("disk full", where="redis")
            scene.last(1.5)
            _restart_redis(world)
        return
    with server.lock:
        size = scene.draw.choice([0, 4096, world.database.stat().st_size])
        prlimit(server.process.pid, RLIMIT_FSIZE, (size, RLIM_INFINITY))
        scene.ledger.note("disk full", where=f"beyond {size}", server=server)
        scene.last(1.5)
        prlimit(server.process.pid, RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))


def lock_database(scene: Scene) -> None:
    """Another process has the file, and keeps it."""
    database = sqlite3.connect(scene.world.database, isolation_level=None, timeout=0.2)
    try:
        database.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        database.close()
        return
    scene.ledger.note("database locked", server=scene.world.servers[0])
    scene.last(2.0)
    database.rollback()
    database.close()


def _restart_redis(world: World) -> None:
    assert world.redis is not None
    world.redis.kill()
    world.redis.start()


def kill_redis(scene: Scene) -> None:
    redis = scene.world.redis
    assert redis is not None
    with scene.world.store_lock:
        redis.kill()
        scene.ledger.note("redis killed", server=scene.server())
        scene.last(1.0)
        redis.start()


def pause_redis(scene: Scene) -> None:
    redis = scene.world.redis
    assert redis is not None
    with scene.world.store_lock:
        redis.pause()
        scene.ledger.note("redis paused", server=scene.server())
        scene.last(1.5)
        redis.wake()


def break_redis_link(scene: Scene) -> None:
    """The network between the servers and the store."""
    redis = scene.world.redis
    assert redis is not None
    proxy: Proxy = redis.proxy
    kind = scene.draw.choice(["cut", "truncate", "hold", "delay", "refuse"])
    with scene.world.store_lock:
        server = scene.server()
        if kind == "cut":
            proxy.cut()
        elif kind == "truncate":
            # Of an answer: the store has done it, and nobody knows.
            proxy.cut_after(scene.draw.choice(list(Way)), scene.draw.randint(1, 2000))
        elif kind == "hold":
            proxy.hold(scene.draw.choice(list(Way)))
        elif kind == "delay":
            proxy.delay(scene.draw.uniform(0.005, 0.1))
        else:
            proxy.refuse()
        scene.ledger.note("store link broken", where=kind, server=server)
        scene.last(1.5)
        if kind == "hold":
            proxy.cut()
        proxy.heal()


# Clients.


def kill_client(scene: Scene) -> None:
    """Its successor goes on from the journal."""
    client = scene.client()
    if not client.is_mortal:
        return
    with client.lock:
        client.process.kill()
        scene.ledger.note("client killed", where=client.folder.name)
        scene.last(0.5)
        client.process.start()


def pause_client(scene: Scene) -> None:
    client = scene.client()
    with client.lock:
        client.process.pause()
        scene.ledger.note("client paused", where=client.folder.name)
        scene.last(1.5)
        client.process.wake()
