"""`sluice serve` as operators run it: a process with flags, variables, a file, signals and logs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import onnx
import pytest

from sluice_protos.sequences_pb2 import (
    OFF,
    PERIODIC,
    STRICT,
    InferRequest,
    ListModelsRequest,
    OpenSequence,
    Tensor,
)
from sluice_protos.sequences_pb2_grpc import ModelsStub, SequencesStub
from sluice_service.settings import Settings

SLUICE = Path(sys.executable).with_name("sluice")
SECONDS = 60
ANYWHERE = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")


def _environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    # Width and colour as in a file, so that help and errors are not wrapped or painted.
    return {**clean, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", **variables}


class Serving:
    """A server process that is ready."""

    def __init__(self, process: subprocess.Popen[str], is_ready: str) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append(line)
            if is_ready in line:
                self.ready = json.loads(line) if line.startswith("{") else {}
                return
        raise AssertionError("".join(self.lines))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit code. What was logged is in `lines` then."""
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.send_signal(number)
        # `communicate` would pass by what the reader of the pipe holds already.
        self.lines += self.process.stderr.readlines()
        assert self.process.stdout.read() == ""
        return self.process.wait(SECONDS)

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.ready['http']}{path}", timeout=SECONDS) as page:
            return page.read().decode()


@contextmanager
def _serving(*flags: object, is_ready: str = '"ready"', **variables: str) -> Iterator[Serving]:
    process = subprocess.Popen(
        [SLUICE, "serve", *ANYWHERE, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(**variables),
    )
    # A server that never says that it is ready must not hold the tests up.
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        yield Serving(process, is_ready)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def _refused(*flags: object, **variables: str) -> str:
    """What a server says that does not start: one line, no traceback."""
    done = subprocess.run(
        [SLUICE, "serve", *map(str, flags)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env=_environment(**variables),
    )
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture
def model(accumulator_file: Path) -> str:
    return f"accumulator={accumulator_file}"


# The whole life.


def test_a_server_starts_answers_and_ends_well_on_sigterm(model) -> None:
    with _serving("--model", model) as server:
        assert server.ready["models"] == ["accumulator"]
        assert server.page("/readyz") == "ready\n"
        assert "sluice_steps_total" in server.page("/metrics")
        with grpc.insecure_channel(server.ready["listen"]) as channel:
            request = InferRequest(
                model="accumulator",
                open=[OpenSequence(lane=0)],
                lane=[0],
                steps=[2],
                inputs=[Tensor(data=bytes.fromhex("0000803f00000040"))],  # 1.0 and 2.0
            )
            responses = SequencesStub(channel).Infer(iter([request]), timeout=SECONDS)
            outputs = b"".join(t.data for response in responses for t in response.outputs)
            assert outputs == bytes.fromhex("0000803f00004040")  # 1.0 and 3.0
        assert server.stop() == 0
        logged = [json.loads(line) for line in server.lines]
        events = [line["event"] for line in logged]
        assert [name for name in events if name in ("model_loaded", "ready", "stopped")] == [
            "model_loaded",
            "ready",
            "stopped",
        ]
        assert all({"level", "timestamp"} <= line.keys() for line in logged)


def test_it_ends_well_on_ctrl_c_too_and_tells_an_open_stream(model) -> None:
    with _serving("--model", model) as server:
        with grpc.insecure_channel(server.ready["listen"]) as channel:
            more = threading.Event()

            def requests() -> Iterator[InferRequest]:
                yield InferRequest(model="accumulator", open=[OpenSequence(lane=0)])
                more.wait(SECONDS)

            responses = SequencesStub(channel).Infer(requests(), timeout=SECONDS)
            next(responses)
            assert server.stop(signal.SIGINT) == 0
            reasons = [closed.reason for response in responses for closed in response.closed]
            more.set()
            assert reasons == [5]  # DRAINING
        assert all(json.loads(line) for line in server.lines)


def test_logs_may_be_text_for_eyes(model) -> None:
    with _serving("--model", model, "--log-format", "console", is_ready="ready ") as server:
        assert server.stop() == 0
    assert any("model_loaded" in line for line in server.lines)
    assert not any(line.startswith("{") or "\x1b" in line for line in server.lines)


# What does not start.


def test_a_model_file_that_cannot_be_served_is_told_in_one_line(tmp_path, accumulator_file) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    proto = onnx.load_model(accumulator_file)
    (tmp_path / "cut.onnx").write_bytes(proto.SerializeToString()[:200])
    del proto.metadata_props[:]
    (tmp_path / "bare.onnx").write_bytes(proto.SerializeToString())
    changed = onnx.load_model(accumulator_file)
    changed.graph.initializer[0].raw_data = b"\1" * len(changed.graph.initializer[0].raw_data)
    (tmp_path / "changed.onnx").write_bytes(changed.SerializeToString())
    expected = {
        "missing.onnx": "cannot be read",
        "text.onnx": "is not an ONNX file",
        "empty.onnx": "is not an ONNX file",
        "cut.onnx": "is not an ONNX file",
        "bare.onnx": "sluice export",
        "changed.onnx": "export it again",
        ".": "cannot be read",
    }
    with ThreadPoolExecutor(2) as two:
        said = two.map(
            lambda name: _refused("--model", f"m={tmp_path / name}", *ANYWHERE), expected
        )
        for (name, words), text in zip(expected.items(), said, strict=True):
            assert words in text
            assert str(tmp_path / name) in text
            assert len(text.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--listen", "--http"])
def test_a_port_that_is_taken_is_told_with_the_flag_to_change(model, flag) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = _refused("--model", model, *ANYWHERE, flag, address)
    last = text.splitlines()[-1]
    assert address in last
    assert flag in last
    # Before it, only log lines.
    assert all(json.loads(line) for line in text.splitlines()[:-1])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--sequences-max", "0"), "--sequences-max: "),
        (("--sequences-max", "many"), "--sequences-max: "),
        (("--sequence-idle-seconds-max", "-1"), "--sequence-idle-seconds-max: "),
        (("--listen", "nowhere"), "--listen: 'nowhere' is not HOST:PORT"),
        (("--http", "127.0.0.1:70000"), "--http: '127.0.0.1:70000' is not HOST:PORT"),
        (("--non-finite", "perhaps"), "--non-finite: "),
        (("--log-level", "loud"), "--log-level: "),
        (("--model", "no-equals-sign"), "is not NAME=PATH"),
        (("--model", "a=x.onnx", "--model", "a=y.onnx"), "names must differ"),
        (("--config", "/nonexistent.yaml"), "--config: "),
        (
            ("--durability", "periodic"),
            "--durability periodic needs a store; name",
        ),
        (("--durability", "strict"), "--durability strict needs a store; name"),
        (("--store", "memory"), "'memory' is not a store"),
        (("--store", "memory", "--durability", "off"), "'memory' is not a store"),
    ],
)
def test_a_wrong_setting_is_told_by_the_name_of_its_flag(model, flags, words) -> None:
    models = () if "--model" in flags else ("--model", model)
    text = _refused(*models, *ANYWHERE, *flags)
    assert words in text
    assert len(text.splitlines()) == 1


def test_a_wrong_variable_is_told_too(model) -> None:
    text = _refused("--model", model, *ANYWHERE, SLUICE_SEQUENCES_MAX="none")
    assert "--sequences-max: " in text
    assert len(text.splitlines()) == 1


def test_without_a_model_there_is_nothing_to_serve() -> None:
    assert "--model NAME=PATH" in _refused(*ANYWHERE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sequences: 5\n", "sequences"),
        ("sequences_max: many\n", "--sequences-max: "),
        ("model: {a: b\n", "is not YAML of settings"),
        ("- a\n- b\n", "is not YAML of settings"),
        ("just words\n", "is not YAML of settings"),
        ("model: [a=b.onnx, nonsense]\n", "is not NAME=PATH"),
        ("model: {a: [1]}\n", "--model"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path, model, text, words) -> None:
    path = tmp_path / "sluice.yaml"
    path.write_text(text)
    flags = () if text.startswith("model") else ("--model", model)
    said = _refused("--config", path, *flags, *ANYWHERE)
    assert words in said
    assert len(said.splitlines()) == 1


def test_a_flag_that_does_not_exist_is_told(model) -> None:
    assert "--nonsense" in _refused("--model", model, *ANYWHERE, "--nonsense", "1")


# Where settings come from.


def test_flags_are_stronger_than_variables_and_variables_than_the_file(
    tmp_path, model, accumulator_file
) -> None:
    path = tmp_path / "sluice.yaml"
    path.write_text(
        f"model: {{from-file: {accumulator_file}}}\n"
        "sequences_max: 11\nchunk_steps_max: 22\nunacknowledged_steps_max: 33\n"
    )
    with _serving(
        "--chunk-steps-max",
        "222",
        SLUICE_CONFIG=str(path),
        SLUICE_CHUNK_STEPS_MAX="2",
        SLUICE_SEQUENCES_MAX="111",
    ) as server:
        assert server.ready["models"] == ["from-file"]
        assert 'sluice_sequences_max{model="from-file"} 111.0' in server.page("/metrics")
        with grpc.insecure_channel(server.ready["listen"]) as channel:
            request = InferRequest(model="from-file")
            (first,) = SequencesStub(channel).Infer(iter([request]), timeout=SECONDS)
            assert first.limits.chunk_steps_max == 222
            assert first.limits.unacknowledged_steps_max == 33


def test_several_models_may_come_from_flags_or_from_one_variable(
    accumulator_file, stateless_file
) -> None:
    pairs = [f"sum={accumulator_file}", f"plus={stateless_file}"]
    variables = {"SLUICE_MODEL": ",".join(pairs)}
    for flags, environment in (
        (("--model", pairs[0], "--model", pairs[1]), {}),
        ((), variables),
    ):
        with (
            _serving(*flags, **environment) as server,
            grpc.insecure_channel(server.ready["listen"]) as channel,
        ):
            models = ModelsStub(channel).ListModels(ListModelsRequest(), timeout=SECONDS).models
            assert {info.name for info in models} == {"sum", "plus"}


def test_a_store_makes_sequences_durable_unless_durability_is_off(model, tmp_path) -> None:
    store = ("--store", f"sqlite:///{tmp_path}/sequences.db")
    for flags, durability, is_used in (
        (store, PERIODIC, True),
        ((*store, "--durability", "strict"), STRICT, True),
        ((*store, "--durability", "off"), OFF, False),
        ((), OFF, True),
    ):
        with _serving("--model", model, *flags) as server:
            assert any('"store_unused"' in line for line in server.lines) is not is_used
            with grpc.insecure_channel(server.ready["listen"]) as channel:
                request = InferRequest(model="accumulator", open=[OpenSequence(lane=0)])
                responses = SequencesStub(channel).Infer(iter([request]), timeout=SECONDS)
                (opened,) = (one for response in responses for one in response.opened)
                assert opened.durability == durability


def test_help_teaches_every_setting() -> None:
    done = subprocess.run(
        [SLUICE, "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
        env=_environment(),
    )
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in done.stdout
        assert f"SLUICE_{name.upper()}" in done.stdout
        words = re.findall(r"\w+", field.description or "")[:3]
        assert all(word in done.stdout for word in words)
    assert "sluice serve --model" in done.stdout
