"""A range of valid values is told of integers alone, and has values that they can have."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sluice_export import InputError, export, export_onnx
from tests.export.foreign_models import write_voice_detector


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class OneHot(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.cell(nn.functional.one_hot(x.long(), 4).float())[0]


def test_a_range_of_floats_is_refused(tmp_path):
    with pytest.raises(InputError, match="'x' has no integers, so no valid range"):
        export(Plain().eval(), torch.zeros(1, 5, 4), tmp_path / "m.onnx", valid={"x": (0, 5)})


def test_a_range_of_floats_in_a_file_of_others_is_refused(tmp_path):
    source = write_voice_detector(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="'input' has no integers, so no valid range"):
        export_onnx(
            source,
            tmp_path / "served.onnx",
            fixed={"sr": 16000},
            axes={"input": ("batch", 576)},
            valid={"input": (0, 5)},
        )


@pytest.mark.parametrize("valid", [(3, 0), (-1, 3), (256, 300), (0, 10**23)], ids=str)
def test_a_range_without_values_that_the_input_can_have_is_refused(tmp_path, valid):
    codes = torch.zeros(1, 5, dtype=torch.uint8)
    with pytest.raises(InputError, match=f"cannot have values from {valid[0]} .* within 0 to 255"):
        export(OneHot().eval(), codes, tmp_path / "m.onnx", valid={"x": valid})


def test_a_table_may_have_more_rows_than_its_index_can_name(tmp_path):
    module = nn.Sequential(nn.Embedding(300, 4), Plain()).eval()

    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x.int())

    contract = export(
        Bytes().eval(),
        np.zeros((1, 5), np.uint8),
        tmp_path / "m.onnx",
        valid={"x": (0, 299)},
    )
    assert contract.inputs[0].valid.max == 299
