"""The field's blocking client: questions, sequences by number and by name, and errors."""

import sys

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

VALUES = [11, 7, 5, 3, 2, 0, 1]


def tensor(values) -> InferInput:
    array = np.array(values, np.int32)
    tensor = InferInput("INPUT", array.shape, "INT32")
    tensor.set_data_from_numpy(array)
    return tensor


def ask(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("integers")
    assert not client.is_model_ready("nonsense")
    assert "sequence" in client.get_server_metadata().extensions
    metadata = client.get_model_metadata("integers", as_json=True)
    assert metadata["inputs"] == [{"name": "INPUT", "datatype": "INT32", "shape": ["-1", "1"]}]
    config = client.get_model_config("integers").config
    assert config.HasField("sequence_batching")
    assert config.max_batch_size > 0
    names = {model.name for model in client.get_model_repository_index().models}
    assert "integers" in names


def run_sequences(client: InferenceServerClient) -> None:
    """Two sequences side by side, as the client's own example does it."""
    for first, second in ((1001, 1002), ("one", "1001")):
        totals = {first: 0, second: 100}
        for index, value in enumerate(VALUES):
            for sequence, sign in ((first, 1), (second, -1)):
                start = 100 if index == 0 and sign < 0 else 0
                answer = client.infer(
                    "integers",
                    [tensor([[sign * value + start]])],
                    outputs=[InferRequestedOutput("OUTPUT")],
                    request_id=f"{sequence}-{index}",
                    sequence_id=sequence,
                    sequence_start=index == 0,
                    sequence_end=index == len(VALUES) - 1,
                )
                totals[sequence] += sign * value
                assert answer.as_numpy("OUTPUT").tolist() == [[totals[sequence]]]
                assert answer.get_response().id == f"{sequence}-{index}"


def run_without(client: InferenceServerClient) -> None:
    """Without a sequence, in batches and with steps."""
    answer = client.infer("integers", [tensor([[1], [2]])])
    assert answer.as_numpy("OUTPUT").tolist() == [[1], [2]]
    answer = client.infer("integers", [tensor([[[1], [2]]])])
    assert answer.as_numpy("OUTPUT").tolist() == [[[1], [3]]]


def fail(client: InferenceServerClient) -> None:
    for words, options in {
        "must specify the START flag": {"sequence_id": 77},
        "no model": {"model": "nonsense"},
        "batch of 2": {"sequence_id": 78, "sequence_start": True, "values": [[1], [2]]},
    }.items():
        values = options.pop("values", [[1]])
        try:
            client.infer(options.pop("model", "integers"), [tensor(values)], **options)
        except InferenceServerException as error:
            assert words in error.message(), error
        else:
            raise AssertionError(words)


def repeat(client: InferenceServerClient) -> None:
    """The one parameter of our own."""
    for _ in range(2):
        answer = client.infer(
            "integers",
            [tensor([[4]])],
            sequence_id=79,
            sequence_start=True,
            parameters={"sequence_step": 0},
        )
        assert answer.as_numpy("OUTPUT").tolist() == [[4]]
    answer = client.infer("integers", [tensor([[4]])], sequence_id=79, sequence_end=True)
    assert answer.as_numpy("OUTPUT").tolist() == [[8]]


def count(client: InferenceServerClient) -> None:
    (before,) = client.get_inference_statistics("integers").model_stats
    client.infer("integers", [tensor([[1]])])
    (after,) = client.get_inference_statistics("integers").model_stats
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.inference_count == before.inference_count + 1
    assert after.execution_count == before.execution_count + 1


with InferenceServerClient(sys.argv[1]) as blocking:
    for part in (ask, run_sequences, run_without, fail, repeat, count):
        part(blocking)
print("done")
