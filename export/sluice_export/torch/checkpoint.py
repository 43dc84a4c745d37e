"""Reads checkpoints, of PyTorch or in safetensors, and loads their weights into a module."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn

from sluice_export.errors import CheckpointError

# The keys under which training scripts save the weights beside optimizer and step.
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model")
# The prefixes that wrappers of a module put before the names of its weights.
_PREFIXES: Final = ("module.", "_orig_mod.")
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load the weights at `path` into `module`. Raises CheckpointError where they do not fit."""
    weights = read_weights(path)
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise CheckpointError(
            f"{path}: its weights are not those of {type(module).__name__}: "
            f"{' '.join(problems[:3])} Make the module as it was trained (--arg name=value)"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a .safetensors file, or in a file that torch.save wrote, by name.

    The latter holds a state_dict, or one under "state_dict", "model_state_dict" or "model". No
    code in the file is run. Raises CheckpointError.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _read_safetensors(file.read(), path)
            content = _read_torch(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return _find_weights(content, path)


def _read_torch(file: BinaryIO, path: Path) -> object:
    """The content of a file that torch.save wrote; no code in it is run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than weights, or is no checkpoint; write it with "
            "torch.save(module.state_dict(), path)"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: is no checkpoint of PyTorch, or is cut short; write it with "
            "torch.save(module.state_dict(), path)"
        ) from error


def _find_weights(content: object, path: Path) -> dict[str, Tensor]:
    """The state_dict within a checkpoint, without the prefixes of wrappers."""
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise CheckpointError(
            f"{path}: holds no state_dict; write it with torch.save(module.state_dict(), path)"
        )
    weights = {str(name): value for name, value in content.items()}
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _read_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises CheckpointError.

    Source: the format as https://github.com/huggingface/safetensors describes it: the
    header's length in 8 bytes, the header in JSON, the tensors.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8:start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            content = bytearray(data[start + first : start + last])
            flat = torch.frombuffer(content, dtype=_DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is no safetensors file, or is cut short; write it with "
            "safetensors.torch.save_file(module.state_dict(), path)"
        ) from error
    return tensors
