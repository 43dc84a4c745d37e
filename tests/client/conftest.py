"""The servers that client tests talk to."""

from collections.abc import Iterator

import pytest

from tests.client.recording_server import RecordingServer
from tests.client.server_process import ServerProcess


@pytest.fixture(scope="session")
def server(accumulator_file, lstm_file, embedding_file, multi_file) -> Iterator[ServerProcess]:
    process = ServerProcess(
        {
            "accumulator": accumulator_file,
            "lstm": lstm_file.path,
            "embedding": embedding_file.path,
            "multi": multi_file.path,
        }
    )
    yield process
    process.stop()


@pytest.fixture
def recorder() -> Iterator[RecordingServer]:
    with RecordingServer() as server:
        yield server
