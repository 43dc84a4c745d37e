"""`sluice bench` measures a real server, and believes no output that it has not compared."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_cli.bench.plan import Plan, Sizes
from sluice_cli.bench.run import run_load
from sluice_cli.bench.tally import Tally, quantiles
from sluice_cli.bench.traffic import Rotation
from sluice_cli.bench.watched import watch_process
from tests.client.model_server import Stream
from tests.client.recording_server import RecordingServer
from tests.processes import free_port, running

SLUICE = str(Path(sys.executable).with_name("sluice"))


@pytest.fixture(scope="module")
def server(lstm_file, rnn_file, multi_file, accumulator_file) -> Iterator[tuple[str, str, int]]:
    """A server's address, its metrics page and its process."""
    address, page = (f"127.0.0.1:{free_port()}" for _ in range(2))
    command = [SLUICE, "serve", "--listen", address, "--http", page]
    models = {"lstm": lstm_file.path, "rnn": rnn_file.path, "multi": multi_file.path}
    for name, path in [*models.items(), ("sum", accumulator_file)]:
        command += ["--model", f"{name}={path}"]
    with running(command, ready=f"http://{page}/readyz") as process:
        yield address, page, process.pid


@pytest.fixture
def bench(server):
    """Run `sluice bench` for a moment: its JSON, or what it printed."""
    address, page, _ = server

    def run_for(seconds: float, model: str, *arguments: str, fails: bool = False):
        command = [SLUICE, "bench", model, "--address", address, "--http", page]
        command += ["--duration", str(seconds), "--warmup", "0.1", "--sequences", "8"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert bool(done.returncode) is fails, done.stderr
        return done.stderr if fails else done.stdout

    def run(model: str, *arguments: str, as_json: bool = True, fails: bool = False):
        if fails or not as_json:
            return run_for(0.5, model, *arguments, fails=fails)
        # On a busy machine nobody may have had a turn within a moment.
        for seconds in (0.5, 1, 2, 4, 8, 16):
            found = json.loads(run_for(seconds, model, "--json", *arguments))
            if found["latency_ms"]["p50"] and found["server_cpu_us_per_step"]:
                break
        return found

    return run


def test_the_figures_of_a_closed_loop_are_one_object(bench, lstm_file) -> None:
    found = bench("lstm", "--verify", str(lstm_file.path))
    assert found["steps_per_second"] > 0
    assert found["server_cpu_us_per_step"] > 0
    assert found["server_rss_bytes"] > 10_000_000
    assert found["sequences"] == 8
    assert found["verified_steps"] >= 8
    for latencies in (found["latency_ms"], found["chunk_latency_ms"]):
        values = [latencies[name] for name in ("p50", "p90", "p99", "p999")]
        assert 0 < values[0] <= values[1] <= values[2] <= values[3]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rate", "500"),
        ("--steps", "1:90,7:10", "--in-flight", "5"),
        ("--steps", "3", "--rate", "900"),
        ("--streams", "8"),
        ("--streams", "3", "--processes", "2", "--in-flight", "4"),
    ],
    ids=" ".join,
)
def test_every_kind_of_load_is_verified(bench, lstm_file, arguments) -> None:
    found = bench("lstm", *arguments, "--verify", str(lstm_file.path))
    assert found["verified_steps"] > 0
    assert found["steps_per_second"] > 0
    assert found["unanswered_chunks"] == 0


def test_models_with_several_inputs_and_outputs_are_verified(bench, multi_file) -> None:
    found = bench("multi", "--steps", "1,4", "--verify", str(multi_file.path))
    assert found["verified_steps"] > 0
    assert found["chunk_latency_ms_by_steps"].keys() == {"1", "4"}


def test_a_model_whose_bits_need_a_larger_batch_is_verified(bench, rnn_file) -> None:
    assert bench("rnn", "--verify", str(rnn_file.path))["verified_steps"] > 0


def test_an_open_loop_sends_at_its_rate_whatever_comes_of_it(server) -> None:
    plan = Plan(
        model="sum",
        addresses=(server[0],),
        sequences=8,
        in_flight=8,
        streams=1,
        processes=1,
        sizes=Sizes.parse("1"),
        rate=400,
        warmup=0.1,
        duration=2,
        kept_steps=0,
    )
    # Poisson arrivals: 800 are due, five standard deviations to either side. When they are
    # answered is another question.
    assert 800 - 142 < run_load(plan).tally.chunks.sum() < 800 + 142


class SilentServer(RecordingServer):
    """Opens sequences, but takes no step before `may_step` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_step = threading.Event()

    def __exit__(self, *_: object) -> None:
        self.may_step.set()
        super().__exit__()

    def _read(self, stream: Stream, requests: Iterator, answers: Queue) -> None:
        super()._read(stream, self._hold(requests), answers)

    def _hold(self, requests: Iterator) -> Iterator:
        for request in requests:
            if request.lane:
                self.may_step.wait()
            yield request


def test_a_pause_of_the_server_is_felt_by_all_that_was_due_in_it() -> None:
    with SilentServer() as server:
        plan = Plan(
            model="sum",
            addresses=(server.address,),
            sequences=2,
            in_flight=2,
            streams=1,
            processes=1,
            sizes=Sizes.parse("1"),
            rate=200,
            warmup=0,
            duration=2,
            kept_steps=0,
        )

        def tell(what: str, share: float, steps: int) -> None:
            assert not steps or server.may_step.is_set()
            if what == "waiting":  # all that is sent was due by now
                server.may_step.set()

        tally = run_load(plan, tell=tell).tally
    # 400 were due, five standard deviations to either side: a generator that waits for
    # answers would have sent two. Half of them were due in the first of two seconds, and had
    # no answer before the second was over, however late everybody was.
    assert 400 - 100 < tally.chunks.sum() < 400 + 100
    assert tally.of_steps()["p50"] > 700


def test_another_file_than_the_one_that_is_served_fails_the_verification(
    bench, gru_file, accumulator_file
) -> None:
    # Inputs and outputs of the same shape, other weights.
    message = bench("lstm", "--verify", str(gru_file.path), fails=True)
    assert "differ from the offline run, the first is step 0" in message
    message = bench("lstm", "--verify", str(accumulator_file), fails=True)
    assert "cannot run what the server was sent" in message


def test_people_get_a_table(bench, lstm_file) -> None:
    shown = bench("lstm", "--verify", str(lstm_file.path), "--steps", "1,5", as_json=False)
    for words in ("steps a second", "p99.9", "of a chunk of 5", "µs of CPU a step", "bit for bit"):
        assert words in shown


def test_the_server_may_be_named_by_its_process(bench, server) -> None:
    assert bench("sum", "--pid", str(server[2]))["server_cpu_us_per_step"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "no model 'nothing' is served here"),
        (("lstm", "--steps", "0"), "give steps, such as 64"),
        (("lstm", "--steps", "1:0"), "1:90,64:10"),
        (("lstm", "--streams", "9"), "raise --sequences"),
        (("lstm", "--pid", "999999999"), "cannot be read"),
        (("lstm", "--http", "localhost:page"), "give the HOST:PORT of the server's --http"),
    ],
)
def test_what_cannot_be_measured_is_said(bench, arguments, message) -> None:
    assert message in " ".join(bench(*arguments, fails=True).replace("│", " ").split())


def test_a_process_that_is_watched_is_seen_to_work() -> None:
    watch = watch_process(os.getpid())
    before = watch()
    while watch().cpu_seconds < before.cpu_seconds + 0.05:
        sum(range(10_000))
    assert watch().resident_bytes > 10_000_000


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), min_size=1, max_size=50),
)
def test_quantiles_count_each_entry_as_often_as_its_weight(entries) -> None:
    seconds, weights = (np.array(column, float) for column in zip(*entries, strict=True))
    alone = np.sort(np.repeat(seconds, weights.astype(int)))
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        expected = alone[int(np.ceil(round(share * len(alone), 9))) - 1]
        assert quantiles(seconds, weights)[name] == pytest.approx(1000 * expected)


def test_a_step_waits_for_its_chunk() -> None:
    tally = Tally(
        latencies=np.array([0.001, 0.1]),
        chunks=np.array([9.0, 1.0]),
        steps=np.array([1.0, 91.0]),
        lateness=np.zeros(0),
        steps_done=100,
        unanswered=0,
    )
    assert tally.of_chunks()["p50"] == 1
    assert tally.of_steps()["p50"] == 100
    assert tally.of_chunks(91)["p50"] == 100


@given(st.integers(1, 20), st.lists(st.integers(1, 20), max_size=20))
def test_a_rotation_comes_round_to_every_row(rows, counts) -> None:
    rotation = Rotation(np.random.default_rng(0), rows)
    seen = []
    for count in counts:
        taken = rotation.take(min(count, rows))
        assert len(set(taken.tolist())) == len(taken)
        seen += taken.tolist()
        rotation.give(taken)
    for start in range(0, len(seen) - rows + 1):
        assert sorted(seen[start : start + rows]) == list(range(rows))


def test_sizes_are_drawn_by_their_weights() -> None:
    sizes = Sizes.parse("1:90,64:10")
    drawn = sizes.draw(np.random.default_rng(0), 10_000)
    assert set(drawn.tolist()) == {1, 64}
    assert (drawn == 64).mean() == pytest.approx(0.1, abs=0.02)
    assert sizes.mean == pytest.approx(7.3)
