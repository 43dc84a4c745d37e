"""The exported models that all tests share, each made once a session."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, and for every process that a test starts: small models gain
# nothing from more threads, and threads that wait for each other stand still on a busy
# machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No example has a time of its own: a busy machine may take as long as it likes.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

if TYPE_CHECKING:  # torch takes seconds to import, and many tests need none
    from tests.models import ExportedModel


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def export_once(models_folder: Path) -> "Callable[..., ExportedModel]":
    """`export_once(name, module, example_inputs, **options)` to an ExportedModel."""

    def make(name, module, example_inputs, **options):
        from sluice_export import export
        from tests.models import ExportedModel

        path = models_folder / f"{name}.onnx"
        export(module, example_inputs, path, name=name, **options)
        return ExportedModel(path, module)

    return make


@pytest.fixture(scope="session")
def lstm_file(export_once) -> "ExportedModel":
    """Two layers of LSTM and a head: x [8] to y [4]."""
    import torch

    from tests.models import lstm_module

    return export_once("lstm", lstm_module(), torch.zeros(1, 5, 8))


@pytest.fixture(scope="session")
def gru_file(export_once) -> "ExportedModel":
    """A GRU and a head: x [8] to y [4]."""
    import torch

    from tests.models import gru_module

    return export_once("gru", gru_module(), torch.zeros(1, 5, 8))


@pytest.fixture(scope="session")
def rnn_file(export_once) -> "ExportedModel":
    """An RNN (tanh) and a head: x [8] to y [4]; runs alone are padded to a batch of 2."""
    import torch

    from tests.models import rnn_module

    return export_once("rnn", rnn_module(), torch.zeros(1, 5, 8))


@pytest.fixture(scope="session")
def embedding_file(export_once) -> "ExportedModel":
    """Next-token scores: tokens [] int64 from 0 to 31, to y [32]."""
    import torch

    from tests.models import embedding_module

    return export_once("embedding", embedding_module(), torch.zeros(1, 5, dtype=torch.int64))


@pytest.fixture(scope="session")
def multi_file(export_once) -> "ExportedModel":
    """features [6] float32 and tokens [] int64 from 0 to 9, to scores [5] and choice [] int64."""
    import torch

    from tests.models import multi_module

    example = (torch.zeros(1, 5, 6), torch.zeros(1, 5, dtype=torch.int64))
    return export_once("multi", multi_module(), example, output_names=["scores", "choice"])


@pytest.fixture(scope="session")
def accumulator_file(models_folder: Path) -> Path:
    """The running sum of x [1], exact for small integers; its state is the sum, [1]."""
    from tests.models import write_accumulator

    path = models_folder / "accumulator.onnx"
    write_accumulator(path)
    return path


@pytest.fixture(scope="session")
def stateless_file(models_folder: Path) -> Path:
    """x [2] plus one, without state and without lengths."""
    from tests.models import write_stateless

    path = models_folder / "stateless.onnx"
    write_stateless(path)
    return path
