"""What a store finds out at its start: warnings, and refusals that name the fix."""

import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import redis
import trustme

from sluice_service.store import StoreError, StoreSetupError, open_store, redact
from sluice_service.store.sqlite import SqliteStore
from sluice_service.store.sqlite.file import SqliteFile
from sluice_service.store.sqlite.location import find_file_system, judge_file_system
from tests.chaos.processes import RedisProcess
from tests.processes import free_port
from tests.service.store.places import ask, claim, key

open_one = partial(open_store, tombstone_seconds=60.0, record_seconds=600.0)


# URLs.


@pytest.mark.parametrize(
    "url", ["", "memory", "sqlite://", "sqlite:///", "postgres://h/d", "redis:h"]
)
def test_a_url_of_no_store_is_refused_with_the_forms_that_work(url) -> None:
    with pytest.raises(
        StoreSetupError, match=r"one of sqlite:///.*sqlite:rel.*redis://.*rediss://"
    ):
        open_one(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@h:port/0",
        "redis://me:hunter2@h/0?nonsense=1",
        "rediss://:hunter2@h/0?ssl_cert_reqs=some",
        "postgres://me:hunter2@h/d",
        "redis://me:hunter2@[h/0",
        "redis://:hunter2/3@h/0",
        "redis://:hunter2",
        "redis:me:hunter2@h",
    ],
)
def test_no_message_about_a_url_tells_its_password(url) -> None:
    with pytest.raises(StoreSetupError) as caught:
        open_one(url)
    assert "hunter2" not in str(caught.value)


def test_a_url_is_shown_without_its_password() -> None:
    assert redact("redis://me:secret@h:1/0?prefix=a:") == "redis://h:1/0"
    assert redact("sqlite:////var/lib/sluice.db") == "sqlite:////var/lib/sluice.db"
    assert redact("word") == "word"
    assert "secret" not in redact("redis://me:secret@[h/0")
    assert "secret" not in redact("redis://h/0?password=secret")


async def test_a_path_of_sqlite_is_absolute_with_slashes_and_relative_without(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert str(tmp_path).startswith("/")
    for url, path in (
        ("sqlite:a/relative.db", tmp_path / "a" / "relative.db"),
        (f"sqlite://{tmp_path}/three.db", tmp_path / "three.db"),
        (f"sqlite:///{tmp_path}/four.db", tmp_path / "four.db"),
        (f"sqlite://{tmp_path}/with space?and#more%.db", tmp_path / "with space?and#more%.db"),
    ):
        store = open_one(url)
        await store.start()
        await store.stop()
        assert path.exists()


def test_a_file_in_the_root_is_taken_for_a_relative_path_and_told() -> None:
    with pytest.raises(StoreSetupError, match=r"in the working directory say sqlite:sluice\.db"):
        open_one("sqlite:///sluice.db")


# SQLite.


async def test_a_folder_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(StoreSetupError, match="make it, or mend the path"):
        await open_one(f"sqlite:///{tmp_path}/nowhere/store.db").start()


async def test_a_folder_is_not_a_file(tmp_path) -> None:
    with pytest.raises(StoreSetupError, match="is not a file"):
        await open_one(f"sqlite:///{tmp_path}").start()


async def test_a_file_that_is_no_database_is_refused(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("nothing of a database " * 100)
    with pytest.raises(StoreSetupError, match="file is not a database"):
        await open_one(f"sqlite:///{tmp_path}/notes.txt").start()
    assert (tmp_path / "notes.txt").read_text().startswith("nothing")


async def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path) -> None:
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE sequences (id INTEGER)")
    connection.close()
    with pytest.raises(StoreSetupError, match="database of another program"):
        await open_one(f"sqlite:///{path}").start()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("sequences",)]
    connection.close()


async def test_a_file_of_a_newer_sluice_is_refused(tmp_path) -> None:
    path = tmp_path / "store.db"
    store = open_one(f"sqlite:///{path}")
    await store.start()
    await store.stop()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(StoreSetupError, match="has schema 2 and this Sluice knows 1"):
        await open_one(f"sqlite:///{path}").start()


async def test_a_file_that_is_locked_at_the_start_may_be_tried_again(tmp_path) -> None:
    path = tmp_path / "store.db"
    intruder = sqlite3.connect(path, isolation_level=None)
    intruder.execute("BEGIN EXCLUSIVE")
    store = SqliteStore(path, tombstone_seconds=60, record_seconds=600, busy_seconds=0.1)
    with pytest.raises(StoreError, match="locked"):
        await store.start()
    intruder.execute("ROLLBACK")
    intruder.close()
    assert await store.start() == []
    await claim(store, ask())
    await store.stop()


def test_every_connection_has_each_commit_on_the_disk(tmp_path) -> None:
    file = SqliteFile(tmp_path / "store.db", lambda: 0.0, busy_seconds=1)
    file.create()
    for _ in range(2):
        with file.transaction(is_writing=True) as transaction:
            (journal,) = transaction.connection.execute("PRAGMA journal_mode").fetchone()
            (synchronous,) = transaction.connection.execute("PRAGMA synchronous").fetchone()
            assert (journal, synchronous) == ("wal", 2)
        file.close()  # the next transaction opens it again


def test_the_log_is_begun_anew_as_soon_as_nobody_reads_in_it_any_more(tmp_path) -> None:
    path = tmp_path / "store.db"
    file = SqliteFile(path, lambda: 0.0, busy_seconds=0.05, log_bytes_max=100_000)
    file.create()

    def write() -> int:
        with file.transaction(is_writing=True) as transaction:
            row = (1, 1, bytes(50_000))
            transaction.connection.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)", row
            )
        return path.with_name("store.db-wal").stat().st_size

    write()
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM checkpoints").fetchall()
    sizes = [write() for _ in range(6)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 300_000
    reader.close()
    # Not at once: so that a long reader does not slow every commit down.
    sizes = [write() for _ in range(12)]
    assert min(sizes) == 0
    assert max(sizes[sizes.index(0) :]) < 200_000
    file.close()


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export /mnt/share nfs4 rw 0 0
/dev/sdb1 /mnt/share/local xfs rw 0 0
tmpfs /mnt/with\\040space tmpfs rw 0 0
//server/share /mnt/share/local/deep cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/lib", "ext4"),
        ("/mnt/share", "nfs4"),
        ("/mnt/shared", "ext4"),
        ("/mnt/share/local/sluice", "xfs"),
        ("/mnt/share/local/deep/down", "cifs"),
        ("/mnt/with space/x", "tmpfs"),
    ],
)
def test_a_file_is_on_the_file_system_that_is_mounted_closest_above_it(folder, kind) -> None:
    assert find_file_system(Path(folder), MOUNTS) == kind


def test_network_file_systems_are_refused_and_memory_is_told() -> None:
    path = Path("store.db")
    assert judge_file_system(path, "ext4") == judge_file_system(path, "") == []
    assert "outlives the server, but not the machine" in judge_file_system(path, "tmpfs")[0]
    for kind in ("nfs4", "cifs", "fuse.sshfs"):
        with pytest.raises(StoreSetupError, match=r"network file system .* put it on a local disk"):
            judge_file_system(path, kind)


# Redis.


@pytest.fixture
def start_redis(tmp_path) -> Iterator[Callable[..., RedisProcess]]:
    """`start_redis(*flags)`: a Redis that is as safe as can be, but for the flags."""
    started = list[RedisProcess]()

    def start(*flags: str) -> RedisProcess:
        process = RedisProcess(tmp_path / f"redis{len(started)}", *flags)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.close()


async def warnings_of(process: RedisProcess) -> list[str]:
    store = open_one(f"redis://127.0.0.1:{process.port}/0")
    warnings = await store.start()
    await store.stop()
    return warnings


async def test_a_redis_that_keeps_every_promise_gets_no_warning(start_redis) -> None:
    assert await warnings_of(start_redis()) == []


async def test_what_a_redis_may_lose_is_told_at_the_start(start_redis) -> None:
    process = start_redis()
    settings = redis.Redis(port=process.port)
    settings.config_set("no-appendfsync-on-rewrite", "yes")
    (warning,) = await warnings_of(process)
    assert "no-appendfsync-on-rewrite" in warning
    settings.config_set("appendfsync", "everysec")
    (warning,) = await warnings_of(process)
    assert "appendfsync everysec" in warning
    assert "strict durability needs appendfsync always" in warning
    settings.config_set("appendonly", "no")
    (warning,) = await warnings_of(process)
    assert "appendonly no" in warning
    settings.config_set("maxmemory-policy", "volatile-lru")  # our keys have no TTL
    (warning,) = await warnings_of(process)
    assert "appendonly no" in warning


async def test_a_redis_that_may_evict_sequences_is_refused(start_redis) -> None:
    process = start_redis("--maxmemory-policy", "allkeys-lru")
    with pytest.raises(StoreSetupError, match="CONFIG SET maxmemory-policy noeviction"):
        await warnings_of(process)


async def test_a_redis_that_hides_its_settings_is_told(start_redis) -> None:
    process = start_redis("--rename-command", "CONFIG", "")
    (warning,) = await warnings_of(process)
    assert "does not show its settings" in warning
    assert "appendfsync always" in warning


async def test_a_replica_is_refused_and_its_primary_is_warned_of(start_redis) -> None:
    primary = start_redis("--repl-diskless-sync-delay", "0")
    replica = start_redis("--replicaof", "127.0.0.1", str(primary.port))
    replica.line("MASTER <-> REPLICA sync: Finished")
    with pytest.raises(StoreSetupError, match="name its primary"):
        await warnings_of(replica)
    (warning,) = await warnings_of(primary)
    assert "a failover may lose acknowledged writes" in warning


async def test_a_cluster_is_refused(start_redis) -> None:
    with pytest.raises(StoreSetupError, match="is a cluster"):
        # Its usual second port, 10,000 above the first, may be none.
        await warnings_of(
            start_redis("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        )


async def test_a_full_redis_is_told_and_loses_nothing(start_redis) -> None:
    process = start_redis()
    store = open_one(f"redis://127.0.0.1:{process.port}/0")
    await store.start()
    await claim(store, ask())
    settings = redis.Redis(port=process.port)
    settings.config_set("maxmemory", "1mb")
    with pytest.raises(StoreError, match="maxmemory"):
        await store.claim([ask("another")])
    assert (await store.read(key())) is not None
    settings.config_set("maxmemory", "0")
    await claim(store, ask("another"))
    await store.stop()


async def test_a_password_opens_a_redis_and_a_wrong_one_does_not(start_redis) -> None:
    process = start_redis("--requirepass", "correct horse")
    for user in ("", ":hunter2@"):
        with pytest.raises(StoreSetupError, match="user and password") as caught:
            await open_one(f"redis://{user}127.0.0.1:{process.port}/0").start()
        assert "hunter2" not in str(caught.value)
    store = open_one(f"redis://:correct%20horse@127.0.0.1:{process.port}/0")
    await store.start()
    await claim(store, ask())
    process.kill()
    with pytest.raises(StoreError) as told:
        await store.read(key())
    assert "horse" not in str(told.value)
    await store.stop()


async def test_a_redis_is_spoken_to_through_tls_and_only_with_its_own_certificate(
    start_redis, tmp_path
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    files = {name: str(tmp_path / name) for name in ("key", "certificate", "authority")}
    certificate.private_key_pem.write_to_path(files["key"])
    certificate.cert_chain_pems[0].write_to_path(files["certificate"])
    authority.cert_pem.write_to_path(files["authority"])
    port = free_port()
    start_redis(
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-key-file", files["key"], "--tls-cert-file", files["certificate"]),
        *("--tls-ca-cert-file", files["authority"]),
    )
    with pytest.raises((StoreError, StoreSetupError), match="CERTIFICATE_VERIFY_FAILED"):
        await open_one(f"rediss://localhost:{port}/0").start()
    store = open_one(f"rediss://localhost:{port}/0?ssl_ca_certs={files['authority']}")
    assert await store.start() == []
    granted = await claim(store, ask())
    assert granted.checkpoint.data == b"initial"
    await store.stop()


async def test_prefixes_keep_two_stores_in_one_redis_apart(redis_url) -> None:
    first = open_one(f"{redis_url}?prefix=one:")
    second = open_one(f"{redis_url}?prefix=two:")
    for store in (first, second):
        await store.start()
        await claim(store, ask())
    assert (await first.read(key())).epoch == (await second.read(key())).epoch == 1
    names = redis.Redis.from_url(redis_url).keys("[ot][nw][eo]:*")
    kept = ("clock", "epoch", "expiries", "sequence:m:s")
    assert sorted(names) == [f"{who}:{name}".encode() for who in ("one", "two") for name in kept]
    for store in (first, second):
        await store.stop()


async def test_a_redis_that_is_not_there_may_be_tried_again() -> None:
    store = open_one(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(StoreError, match="did not answer"):
        await store.start()
    await store.stop()
