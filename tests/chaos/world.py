"""Everything that runs in one round: servers and a store behind proxies, and their clients."""

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.instants import Refusal, Trace
from tests.chaos.journal import Journal
from tests.chaos.processes import Process, RedisProcess, ServerProcess
from tests.chaos.reference import Reference
from tests.chaos.task import Task
from tests.chaos.verdict import Verdict, judge, judge_rivals
from tests.chaos.workload import OUTPUT_SIZES, read_id

# Only bounds a hang: what is left to do after the last fault takes seconds.
FINISH_SECONDS_MAX = 300
LIBRARY, THREADS = "tests.chaos.client", "tests.chaos.thread_client"
PLAIN, RIVAL = "tests.chaos.plain_client", "tests.chaos.rival"


@dataclass(frozen=True)
class Setting:
    """What is put together for a round."""

    store: str  # "none", "sqlite", "redis"
    durability: str  # "off", "periodic", "strict"
    servers: int = 1
    processes: int = 1  # of each server
    # What each client's process runs.
    clients: tuple[str, ...] = (LIBRARY, PLAIN)
    # The library acknowledges what its user says is safe; else what it has handed over,
    # and then its process must live.
    holds_outputs: bool = True
    # Everything moves between two servers, of which one is always stopped at an instant.
    is_march: bool = False
    workers: int = 6  # of each client: sequences at once
    steps_max: int = 400  # of a sequence
    pause_seconds: float = 0.003
    # Of the servers' checkpoints, where they are periodic.
    checkpoint_seconds: float = 0.3
    checkpoint_steps: int = 40
    flags: tuple[str, ...] = ()  # of the servers, beside these

    @property
    def name(self) -> str:
        """As tables have it."""
        servers = f", {self.servers} servers" if self.servers > 1 else ""
        processes = f" of {self.processes} processes" if self.processes > 1 else ""
        rivals = ", two claim one sequence" if RIVAL in self.clients else ""
        march = ", back and forth" if self.is_march else ""
        return f"{self.store}, {self.durability}{servers}{processes}{rivals}{march}"

    @property
    def is_durable(self) -> bool:
        """True where sequences outlive their server."""
        return self.durability != "off"


@dataclass(frozen=True)
class Models:
    """The files that are served."""

    accumulator: Path
    lstm: Path


class Server:
    """One server of the world, with its trace; `lock` is held by who does something to it."""

    def __init__(self, process: ServerProcess, trace: Trace) -> None:
        self.process = process
        self.trace = trace
        self.lock = threading.Lock()


class Client:
    """One client of the world, with the folder of its journals."""

    def __init__(self, program: str, folder: Path, *, is_mortal: bool) -> None:
        self.program = program
        # A successor would get all that was acknowledged.
        self.is_mortal = is_mortal
        self.folder = folder
        self.process = Process([sys.executable, "-m", program, str(folder)])
        self.lock = threading.Lock()

    @property
    def received(self) -> int:
        """Bytes in its journals: more, whenever an output has arrived."""
        journals = [*self.folder.glob("*.outputs"), *self.folder.glob("claims")]
        return sum(path.stat().st_size for path in journals)


class World:
    """Made, it stands still; `with` starts everything and ends it."""

    def __init__(
        self, setting: Setting, models: Models, folder: Path, seed: int, *, without: str = ""
    ) -> None:
        """`without` names a rule that the servers do not keep: see `sabotage`."""
        self.setting = setting
        self._without = without
        self.folder = folder
        self._reference = Reference(models.lstm)
        self.redis: RedisProcess | None = None
        self.store_lock = threading.Lock()
        self.database = folder / "sequences.db"
        if setting.store == "redis":
            self.redis = RedisProcess(folder / "redis")
        self.servers = [self._server(models, number) for number in range(setting.servers)]
        self.clients = [self._client(seed, number) for number in range(len(setting.clients))]

    def _server(self, models: Models, number: int) -> Server:
        setting, trace = self.setting, self.folder / f"trace-{number}"
        flags = list(setting.flags)
        if setting.is_durable:
            flags += ["--store", self._store_url(), "--durability", setting.durability]
            flags += ["--checkpoint-seconds", str(setting.checkpoint_seconds)]
            flags += ["--checkpoint-steps", str(setting.checkpoint_steps)]
        if setting.processes > 1:
            flags += ["--workers", str(setting.processes)]
        files = {"accumulator": models.accumulator, "lstm": models.lstm}
        mapped = Trace(trace, is_fresh=True)
        return Server(ServerProcess(files, *flags, trace=trace, without=self._without), mapped)

    def _store_url(self) -> str:
        if self.redis is not None:
            return self.redis.url
        return f"sqlite:///{self.database}"

    def _client(self, seed: int, number: int) -> Client:
        setting = self.setting
        addresses = [server.process.address for server in self.servers]
        first = number % len(addresses)
        addresses = addresses[first:] + addresses[:first]
        program = setting.clients[number]
        is_mortal = setting.holds_outputs or program in (PLAIN, RIVAL)
        client = Client(program, self.folder / f"client-{number}", is_mortal=is_mortal)
        client.folder.mkdir()
        Task(
            addresses,
            seed,
            number,
            setting.workers,
            setting.steps_max,
            setting.pause_seconds,
            setting.holds_outputs,
        ).write(client.folder)
        return client

    def __enter__(self) -> "World":
        try:
            if self.redis is not None:
                self.redis.start()
            for server in self.servers:
                server.process.begin()
            for server in self.servers:
                server.process.await_ready()
            for client in self.clients:
                client.process.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process, whatever it does."""
        for client in self.clients:
            client.process.kill()
        for server in self.servers:
            server.process.close()
        if self.redis is not None:
            self.redis.close()

    def journaled(self, sequence_id: str) -> int:
        """The steps of a sequence whose outputs its client has."""
        folder = self.folder / f"client-{sequence_id.split('-')[1]}"
        model = read_id(sequence_id).model
        return Journal(folder, sequence_id, OUTPUT_SIZES[model]).received

    def heal(self) -> None:
        """Have everything run and every connection pass."""
        if self.redis is not None:
            self.redis.proxy.heal()
            if not self.redis.is_running:
                self.redis.start()
        for server in self.servers:
            server.trace.disarm()
            server.trace.slow_store(0)
            server.trace.refuse_store(Refusal.NONE)
            server.trace.jump_clock(0)
            server.process.proxy.heal()
            server.process.wake()
            if not server.process.is_running:
                server.process.start()
        for client in self.clients:
            if not client.process.is_running:
                client.process.start()

    def finish(self, seconds_max: float = FINISH_SECONDS_MAX) -> Verdict:
        """Heal, let every client come to an end, and judge all that they have received."""
        self.heal()
        for client in self.clients:
            (client.folder / "stop").touch()
        verdict = Verdict()
        for client in self.clients:
            code = client.process.wait(seconds_max)
            if code != 0:
                said = "".join(client.process.lines[-30:])
                verdict.add("error", f"{client.folder.name} ended with {code}:\n{said}")
            verdict.take(judge(client.folder, self._reference))
        rivals = [client.folder for client in self.clients if client.program == RIVAL]
        if rivals:
            verdict.take(judge_rivals(rivals))
        return verdict

    def judge_so_far(self) -> Verdict:
        """Judge what the clients have received by now; what is still to come is no wrong."""
        verdict = Verdict()
        for client in self.clients:
            verdict.take(judge(client.folder, self._reference, must_be_whole=False))
        return verdict

    def tails(self, lines: int = 25) -> str:
        """The last lines that each process has said."""
        parts = []
        for number, server in enumerate(self.servers):
            parts.append(f"--- server {number}\n" + "".join(server.process.lines[-lines:]))
        parts += [
            f"--- {client.folder.name}\n" + "".join(client.process.lines[-lines:])
            for client in self.clients
        ]
        if self.redis is not None:
            parts.append("--- redis\n" + "".join(self.redis.lines[-lines:]))
        return "\n".join(parts)
