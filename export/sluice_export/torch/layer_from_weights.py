"""Makes a recurrent layer from its weights alone: their names and shapes say what it is."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from sluice_export.errors import BidirectionalError, CheckpointError

_NAMES: Final = re.compile(r"(?P<layer>.*\.)?(weight|bias)_(ih|hh|hr)_l(?P<depth>\d+)$")
_LAYERS: Final[dict[int, Callable[..., nn.RNNBase]]] = {4: nn.LSTM, 3: nn.GRU, 1: nn.RNN}


def make_layer(weights: Mapping[str, Tensor], path: Path, options: Mapping[str, Any]) -> nn.RNNBase:
    """The nn.LSTM, nn.GRU or nn.RNN whose state_dict `weights` is, batch first.

    `options` are further arguments of the layer. Raises CheckpointError or
    BidirectionalError, naming what is not of one such layer.
    """
    if any(name.endswith("_reverse") for name in weights):
        raise BidirectionalError(
            f"{path}: holds a bidirectional layer: each of its outputs needs the whole future of "
            "the sequence; train it with bidirectional=False"
        )
    matches = {name: _NAMES.fullmatch(name) for name in weights}
    foreign = [name for name, match in matches.items() if match is None]
    layers = {match["layer"] or "" for match in matches.values() if match}
    if foreign or len(layers) != 1:
        what = ", ".join(foreign or sorted(layers)) or "nothing"
        raise CheckpointError(
            f"{path}: is not the checkpoint of one recurrent layer (it has {what}); name the "
            "factory of the module: sluice export package.module:factory --checkpoint …"
        )
    prefix = layers.pop()
    bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    recurrent, first = bare.get("weight_hh_l0"), bare.get("weight_ih_l0")
    if recurrent is None or first is None or recurrent.dim() != 2 or first.dim() != 2:
        raise CheckpointError(f"{path}: has no matrices weight_ih_l0 and weight_hh_l0")
    projection = bare.get("weight_hr_l0")
    hidden = recurrent.shape[1] if projection is None else projection.shape[-1]
    gates, remainder = divmod(recurrent.shape[0], max(hidden, 1))
    if remainder or gates not in _LAYERS:
        raise CheckpointError(
            f"{path}: weight_hh_l0 has shape {list(recurrent.shape)}; an LSTM has four times as "
            "many rows as columns, a GRU three times, an RNN as many"
        )
    if gates == 1 and "nonlinearity" not in options:
        raise CheckpointError(
            f"{path}: is of an nn.RNN, whose weights do not show its nonlinearity; name it: "
            "--arg nonlinearity=tanh (or relu)"
        )
    if projection is not None:
        options = {**options, "proj_size": recurrent.shape[1]}
    depths = {int(match["depth"]) for match in matches.values() if match}
    try:
        layer = _LAYERS[gates](
            first.shape[1],
            hidden,
            num_layers=max(depths) + 1,
            bias="bias_ih_l0" in bare,
            batch_first=True,
            **options,
        )
        layer.load_state_dict(bare)
    except (RuntimeError, TypeError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: its weights are not of one whole layer ({problem})"
        ) from error
    return layer.eval()
