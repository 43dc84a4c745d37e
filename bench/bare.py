"""Runs bare ONNX Runtime in its own process, with the same file, options and batch.

`python -m bench.bare MODEL` answers each line {"batch": B, "seconds": S} with
{"cpu_us": µs of CPU per run, "wall_us": µs per run}. It imports nothing of Sluice.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import onnxruntime


def load(path: str) -> onnxruntime.InferenceSession:
    """A session with the options that the server uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def make_run(
    session: onnxruntime.InferenceSession, batch: int, steps: int = 1
) -> Callable[[], None]:
    """A function that makes one run of that size, over contiguous inputs in memory."""
    generator = np.random.default_rng(0)
    feed = {"lengths": np.full(batch, steps, np.int32)}
    for tensor in session.get_inputs():
        if tensor.name not in feed:
            shape = (
                (batch, tensor.shape[1])
                if tensor.name == "state"
                else (batch, steps, *tensor.shape[2:])
            )
            feed[tensor.name] = generator.standard_normal(shape).astype(np.float32)
    names = [tensor.name for tensor in session.get_outputs()]

    def run() -> None:
        session.run(names, feed)

    return run


def measure(run: Callable[[], None], seconds: float) -> dict[str, float]:
    """CPU and wall time per run, repeated for that long."""
    for _ in range(3):
        run()
    runs = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) < wall + seconds:
        run()
        runs += 1
    spent = time.process_time() - cpu
    return {"cpu_us": 1e6 * spent / runs, "wall_us": 1e6 * (now - wall) / runs}


def main() -> None:
    """Answer questions until there are no more."""
    session = load(sys.argv[1])
    for line in sys.stdin:
        question = json.loads(line)
        run = make_run(session, question["batch"], question.get("steps", 1))
        print(json.dumps(measure(run, question["seconds"])), flush=True)


if __name__ == "__main__":
    main()
