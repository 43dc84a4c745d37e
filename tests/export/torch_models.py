"""PyTorch modules of the forms that people write, small, with random weights: [8] in."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class TimeFirst(nn.Module):
    """Called with its state, [steps, batch, features], and gives the state back."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 16)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.cell(x, (h, c))


class LearnedStart(nn.Module):
    """Starts from a state that was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 16, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, self.start.expand(1, x.shape[0], 16).contiguous())[0]


class Tied(nn.Module):
    """Shares its embedding's weights with its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.cell = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 32)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(x))[0])


class LSTMLoop(nn.Module):
    """An nn.LSTMCell in a loop over time, from a state that was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 16)
        self.start = nn.Parameter(torch.randn(2, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c = (part.expand(x.size(0), -1) for part in self.start)
        outputs = []
        for step in range(x.size(1)):
            h, c = self.cell(x[:, step], (h, c))
            outputs.append(h)
        return self.head(torch.stack(outputs, dim=1))


class CellStack(nn.Module):
    """An nn.GRUCell below an nn.RNNCell (relu), time first; both h go in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.GRUCell(8, 16)
        self.upper = nn.RNNCell(16, 16, nonlinearity="relu")

    def forward(self, x: Tensor, lower: Tensor, upper: Tensor) -> Any:
        outputs = []
        for row in x:
            lower = self.lower(row, lower)
            upper = self.upper(lower, upper)
            outputs.append(upper)
        return torch.stack(outputs), lower, upper


class LayerLoop(nn.Module):
    """A layer of two depths that is given one step after another."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 16, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for row in x:
            y, state = self.cell(row.unsqueeze(0), state)
            outputs.append(y)
        return torch.cat(outputs)


class LastStep(nn.Module):
    """Classifies by the last step: y[:, -1]."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 16, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class LastState(nn.Module):
    """Classifies by the last h of two layers: h[-1]; and gives every step, too."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.GRU(8, 16, batch_first=True)
        self.upper = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y, lower = self.lower(x)
        y, (upper, _) = self.upper(y)
        return {"scores": self.head(upper[-1] + lower[-1]), "features": y}


class Encoder(nn.Module):
    """Gives nothing but its last h."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[1][-1]


class PaddedConvolution(nn.Conv1d):
    """A convolution that looks back only: it pads its input in front by itself."""

    def forward(self, x: Tensor) -> Tensor:
        width = self.dilation[0] * (self.kernel_size[0] - 1)
        return super().forward(functional.pad(x, (width, 0)))


class ConvolutionBefore(nn.Module):
    """A causal convolution, padded in front by hand, with ones, before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv1d(8, 16, 3)
        self.cell = nn.GRU(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        before = self.before(functional.pad(x.transpose(1, 2), (2, 0), value=1.0))
        return self.cell(torch.relu(before).transpose(1, 2))[0]


class ConvolutionsOnly(nn.Module):
    """Dilated causal convolutions with residuals: one pads both ends and is cut, one is depthwise.

    No recurrent layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 8, 3, padding=2)
        self.second = PaddedConvolution(8, 8, 2, dilation=4, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = x + torch.relu(self.first(x)[..., :-2])
        return (x + torch.tanh(self.second(x))).transpose(1, 2)


class Projected(nn.Module):
    """An LSTM of two depths whose h is projected, from a state that was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 16, num_layers=2, batch_first=True, proj_size=6)
        self.h = nn.Parameter(torch.randn(2, 1, 6))
        self.c = nn.Parameter(torch.randn(2, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        h, c = (part.expand(-1, x.size(0), -1).contiguous() for part in (self.h, self.c))
        return self.cell(x, (h, c))[0]


class Twice(nn.Module):
    """Runs one layer over the sequence twice, from two states."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.again(x)[0])[0]
