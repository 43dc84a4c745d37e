"""The core property: however steps are cut, mixed and interrupted, they equal one offline run."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sluice_protos.sequences_pb2 import RESUME, Closed, OpenSequence, Tensor
from tests.models import run_offline
from tests.service.wire import Served, Wire, floats


@dataclass
class Walk:
    """One sequence on its way through the server."""

    sequence_id: str
    x: np.ndarray
    sent: int = 0
    opens: int = 0
    lane: int = -1
    got: list[np.ndarray] = field(default_factory=list)

    @property
    def received(self) -> int:
        return sum(map(len, self.got))

    def open(self, lane: int) -> OpenSequence:
        self.lane = lane
        self.opens += 1
        return OpenSequence(
            lane=lane,
            sequence_id=self.sequence_id,
            writer=self.sequence_id.encode(),
            attempt=self.opens,
            mode=RESUME if self.opens > 1 else 0,
            received=self.received,
        )

    def take(self, wire: Wire) -> None:
        """File what came for this sequence: never twice, never out of order."""
        for first, steps, (data,) in wire.pieces.pop(self.lane, []):
            assert first == self.received
            self.got.append(np.frombuffer(data, "<f4").reshape(steps, -1))


async def _send_some(wire: Wire, walks: list[Walk], generator: np.random.Generator) -> None:
    """One frame with chunks of some of the sequences, some of them with several."""
    lanes, steps, first, rows = [], [], [], []
    for walk in generator.permutation(np.array(walks, object)).tolist():
        for _ in range(generator.integers(0, 3)):
            count = min(int(generator.integers(1, 12)), len(walk.x) - walk.sent)
            if count:
                lanes.append(walk.lane)
                steps.append(count)
                first.append(walk.sent)
                rows.append(walk.x[walk.sent : walk.sent + count])
                walk.sent += count
    if lanes:
        named = bool(generator.integers(2))
        data = np.concatenate(rows).tobytes()
        await wire.send(
            lane=lanes, steps=steps, first_step=first if named else [], inputs=[Tensor(data=data)]
        )


async def _open(wire: Wire, walks: list[Walk]) -> None:
    """Give each sequence a lane; what the server has applied is where it goes on."""
    await wire.send(open=[walk.open(lane) for lane, walk in enumerate(walks)])
    for walk in walks:
        opened = await wire.next_opened(walk.lane)
        assert walk.received <= opened.applied <= walk.sent
        assert opened.held_from == walk.received
        walk.sent = opened.applied


async def _stream(served: Served, model: str, walks: list[Walk], seed: int) -> None:
    """Stream whole sequences, with parks and cuts on the way."""
    generator = np.random.default_rng(seed)
    while any(walk.received < len(walk.x) for walk in walks):
        wire = served.wire(model)
        await _open(wire, walks)
        is_cut = False
        while not is_cut and any(walk.received < len(walk.x) for walk in walks):
            await _send_some(wire, walks, generator)
            for walk in walks:
                walk.take(wire)
            match generator.integers(8):
                case 0:
                    is_cut = True
                case 1:
                    await wire.send(received_responses=len(wire.responses))
                case 2:
                    walk = walks[int(generator.integers(len(walks)))]
                    await wire.send(park=[walk.lane])
                    assert await wire.next_closed(walk.lane) == Closed.PARKED
                    walk.take(wire)
                    await wire.send(open=[walk.open(walk.lane)])
                    walk.sent = (await wire.next_opened(walk.lane)).applied
                case _:
                    if any(walk.sent > walk.received for walk in walks):
                        await wire.read()
        for walk in walks:
            walk.take(wire)
        wire.cut()


async def _stumble(served: Served, model: str, walks: list[Walk], seed: int) -> None:
    """Stream whole sequences with bad chunks and gaps on the way, and more sent behind each."""
    generator = np.random.default_rng(seed)
    wire = served.wire(model)
    await _open(wire, walks)
    stumbles = faults = 0
    fallen = set[str]()
    while any(walk.received < len(walk.x) for walk in walks):
        lanes, steps, first, rows = [], [], [], []
        for walk in walks:
            kind = generator.choice(["good", "good", "good", "good", "bad", "gap", "none"])
            # Behind a fault the expected step comes first: only then can a gap be told again.
            if kind == "gap" and len(walk.x) - walk.sent > 5 and walk.sequence_id not in fallen:
                walk.sent += int(generator.integers(1, 4))
                stumbles += 1
            count = min(int(generator.integers(1, 9)), len(walk.x) - walk.sent)
            if kind == "none" or not count:
                continue
            chunk = walk.x[walk.sent : walk.sent + count].copy()
            if kind == "bad":
                chunk[generator.integers(count), 0] = np.nan
                stumbles += 1
            fallen.discard(walk.sequence_id)
            lanes.append(walk.lane)
            steps.append(count)
            first.append(walk.sent)
            rows.append(chunk)
            walk.sent += count
        if lanes:
            data = np.concatenate(rows).tobytes()
            await wire.send(lane=lanes, steps=steps, first_step=first, inputs=[Tensor(data=data)])
        if generator.integers(3) and any(walk.sent > walk.received for walk in walks):
            await wire.read()
        for walk in walks:
            walk.take(wire)
            for fault in wire.faults.pop(walk.lane, []):
                # Everything before the fault has come; a client goes on from there.
                assert fault.expected_step == walk.received
                walk.sent = fault.expected_step
                fallen.add(walk.sequence_id)
                faults += 1
    assert 0 < faults <= stumbles


def _run_twice(path: Path, x: np.ndarray) -> np.ndarray:
    """One whole sequence beside its own copy in plain onnxruntime: the RNN op alone, in a
    batch of 1, takes another way through its arithmetic."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    sizes = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    feed = {
        "x": np.stack([x, x]),
        "lengths": np.full(2, len(x), np.int32),
        "state": np.zeros((2, sizes["state"][1]), np.float32),
    }
    (y,) = session.run(["y"], feed)
    return y[0]


@pytest.mark.parametrize("model", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("seed", range(4))
async def test_any_streaming_equals_one_offline_run(model, seed, served, request) -> None:
    path = request.getfixturevalue(f"{model}_file").path
    generator = np.random.default_rng(seed)
    walks = [
        Walk(f"{model}-{seed}-{number}", generator.standard_normal((steps, 8)).astype(np.float32))
        for number, steps in enumerate([1, 5, 17, 40, 64, 100, 150])
    ]
    # Several streams at once, so that sequences of different streams share runs.
    await asyncio.gather(
        _stream(served, model, walks[:3], seed),
        _stream(served, model, walks[3:5], seed + 100),
        _stream(served, model, walks[5:], seed + 200),
    )
    for walk in walks:
        if model == "rnn":
            offline = _run_twice(path, walk.x)
        else:
            (offline,) = run_offline(path, {"x": walk.x})
        assert (np.concatenate(walk.got) == offline).all()


async def test_several_runs_at_once_change_no_bit(serve, lstm_file, monkeypatch) -> None:
    # However small a run is: in a thread, and in parts.
    monkeypatch.setattr("sluice_service.batching.engine.Engine.estimate", lambda *_: 1.0)
    served = await serve({"lstm": lstm_file.path}, runs_at_once_max=3)
    generator = np.random.default_rng(5)
    walks = [
        Walk(f"at-once-{n}", generator.standard_normal((80, 8)).astype(np.float32))
        for n in range(9)
    ]
    await asyncio.gather(*(_stream(served, "lstm", walks[n : n + 3], n) for n in (0, 3, 6)))
    for walk in walks:
        (offline,) = run_offline(lstm_file.path, {"x": walk.x})
        assert (np.concatenate(walk.got) == offline).all()


@pytest.mark.parametrize("seed", range(3))
async def test_faults_among_good_steps_change_nothing(served, lstm_file, seed) -> None:
    generator = np.random.default_rng(seed)
    walks = [
        Walk(f"stumble-{seed}-{n}", generator.standard_normal((150, 8)).astype(np.float32))
        for n in range(6)
    ]
    await asyncio.gather(
        _stumble(served, "lstm", walks[:4], seed), _stumble(served, "lstm", walks[4:], seed + 9)
    )
    for walk in walks:
        (offline,) = run_offline(lstm_file.path, {"x": walk.x})
        assert (np.concatenate(walk.got) == offline).all()


async def test_several_models_at_once_keep_to_themselves(served, lstm_file, gru_file) -> None:
    x = np.random.default_rng(7).standard_normal((90, 8)).astype(np.float32)
    # The same ids in two models are different sequences.
    walks = {name: [Walk(f"same-{n}", x[n:]) for n in range(3)] for name in ("lstm", "gru")}
    await asyncio.gather(*(_stream(served, name, walks[name], 9) for name in walks))
    for name, file in (("lstm", lstm_file), ("gru", gru_file)):
        for walk in walks[name]:
            (offline,) = run_offline(file.path, {"x": walk.x})
            assert (np.concatenate(walk.got) == offline).all()


@pytest.mark.parametrize("seed", range(6))
async def test_no_step_is_lost_or_doubled_or_crosses(served, accumulator_file, seed) -> None:
    # A digit of its own for each sequence: what crosses shows in the sum.
    walks = [
        Walk(f"sum-{seed}-{number}", np.full((30 + 9 * number, 1), 100**number, np.float32))
        for number in range(3)
    ]
    others = [Walk(f"one-{seed}-{number}", floats(range(60))) for number in range(3)]
    await asyncio.gather(
        _stream(served, "accumulator", walks, seed),
        _stream(served, "accumulator", others, seed + 50),
    )
    for walk in [*walks, *others]:
        assert (np.concatenate(walk.got) == np.cumsum(walk.x, axis=0)).all()


async def test_several_inputs_and_outputs_equal_offline(served, multi_file) -> None:
    generator = np.random.default_rng(3)
    features = generator.standard_normal((50, 6)).astype(np.float32)
    tokens = generator.integers(0, 10, 50)
    wire = served.wire("multi")
    await wire.send(open=[OpenSequence(lane=0), OpenSequence(lane=1)])
    for start in range(0, 50, 5):
        part = slice(start, start + 5)
        # Named inputs may come in any order.
        await wire.send(
            lane=[0, 1],
            steps=[5, 5],
            inputs=[
                Tensor(name="tokens", datatype="INT64", data=np.tile(tokens[part], 2).tobytes()),
                Tensor(
                    name="features",
                    datatype="FP32",
                    shape=[6],
                    data=np.tile(features[part], (2, 1)).tobytes(),
                ),
            ],
        )
    scores, choice = run_offline(multi_file.path, {"features": features, "tokens": tokens})
    for lane in (0, 1):
        first, second = await wire.take(lane, 50)
        assert (np.frombuffer(first, "<f4").reshape(50, 5) == scores).all()
        assert (np.frombuffer(second, "<i8") == choice).all()


async def test_tokens_equal_offline(served, embedding_file) -> None:
    tokens = np.random.default_rng(4).integers(0, 32, 200)
    wire = served.wire("embedding")
    await wire.open(0)
    await wire.push(0, tokens)
    (offline,) = run_offline(embedding_file.path, {"tokens": tokens})
    assert (await wire.rows(0, 200) == offline).all()


async def test_the_smallest_client_needs_nothing_but_a_lane_and_data(served) -> None:
    wire = served.wire("accumulator")
    await wire.send(open=[OpenSequence(lane=0)])
    for value in (1, 2, 3):
        await wire.send(lane=[0], inputs=[Tensor(data=floats([value]).tobytes())])
    assert (await wire.rows(0, 3)).tolist() == [[1], [3], [6]]
    await wire.send(close=[0])
    assert await wire.next_closed(0) == Closed.CLIENT
    assert (await wire.end()).name == "OK"


async def test_open_chunks_and_close_may_share_one_message(served) -> None:
    wire = served.wire("accumulator")
    await wire.send(
        open=[OpenSequence(lane=5), OpenSequence(lane=6)],
        lane=[5, 6, 5],
        steps=[1, 2, 1],
        inputs=[Tensor(data=floats([1, 10, 20, 2]).tobytes())],
        close=[5, 6],
    )
    assert (await wire.rows(5, 2)).ravel().tolist() == [1, 3]
    assert (await wire.rows(6, 2)).ravel().tolist() == [10, 30]
    assert await wire.next_closed(5) == await wire.next_closed(6) == Closed.CLIENT


async def test_a_stateless_model_streams_too(serve, stateless_file) -> None:
    served = await serve({"stateless": stateless_file})
    wire = served.wire("stateless")
    await wire.open(0)
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    await wire.push(0, x)
    assert (await wire.rows(0, 5) == x + 1).all()
