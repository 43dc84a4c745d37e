"""The field's client over a stream: sequences by number and by name, side by side, and errors."""

import queue
import sys

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

VALUES = [11, 7, 5, 3, 2, 0, 1]
SECONDS = 60


def tensor(value: int) -> InferInput:
    tensor = InferInput("INPUT", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[value]], np.int32))
    return tensor


def run_sequences(client: InferenceServerClient, answers: queue.Queue) -> None:
    for first, second in ((2001, 2002), ("number one", "2001")):
        for index, value in enumerate(VALUES):
            for sequence, sent in ((first, value), (second, -value)):
                client.async_stream_infer(
                    "integers",
                    [tensor(sent)],
                    request_id=f"{sequence}/{index}",
                    sequence_id=sequence,
                    sequence_start=index == 0,
                    sequence_end=index == len(VALUES) - 1,
                )
        for index in range(len(VALUES)):
            total = sum(VALUES[: index + 1])
            for sequence, expected in ((first, total), (second, -total)):
                answer, error = answers.get(timeout=SECONDS)
                assert error is None, error
                assert answer.get_response().id == f"{sequence}/{index}"
                assert answer.as_numpy("OUTPUT").tolist() == [[expected]]


def go_on_after_an_error(client: InferenceServerClient, answers: queue.Queue) -> None:
    client.async_stream_infer("integers", [tensor(1)], sequence_id=2003)
    client.async_stream_infer(
        "integers",
        [tensor(1)],
        sequence_id=2003,
        sequence_start=True,
        sequence_end=True,
        enable_empty_final_response=True,
    )
    _, error = answers.get(timeout=SECONDS)
    assert "must specify the START flag" in error.message()
    answer, error = answers.get(timeout=SECONDS)
    assert error is None, error
    assert answer.get_response().parameters["triton_final_response"].bool_param


with InferenceServerClient(sys.argv[1]) as streaming:
    received: queue.Queue = queue.Queue()
    streaming.start_stream(lambda result, error: received.put((result, error)))
    run_sequences(streaming, received)
    go_on_after_an_error(streaming, received)
    streaming.stop_stream()
print("done")
