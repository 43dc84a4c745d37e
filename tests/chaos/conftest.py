"""The models that chaos tests serve."""

import pytest

from tests.chaos.world import Models


@pytest.fixture(scope="session")
def models(accumulator_file, lstm_file) -> Models:
    return Models(accumulator_file, lstm_file.path)
