"""Makes a module from its name: `package.module:factory`, its weights, and inputs it accepts."""

import importlib
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn

from sluice_export.errors import CheckpointError, FactoryError, InputError
from sluice_export.torch.argument_roles import REFUSALS
from sluice_export.torch.layer_from_weights import read_safetensors

# Under which training scripts keep the weights beside optimizer and step.
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model")
# What wrappers of a module put before the names of its weights.
_PREFIXES: Final = ("module.", "_orig_mod.")


def make_module(target: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Import `package.module:factory` and call it with `arguments`.

    The factory is a class or function that returns an nn.Module, or a module
    itself; the current directory is searched first. Raises FactoryError.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise FactoryError(
            f"{target!r} names no factory; write package.module:factory, such as "
            "train:CharacterModel"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        factory: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            factory = getattr(factory, name)
    except ModuleNotFoundError as error:
        raise FactoryError(
            f"{module_name} cannot be imported ({error}); run from the folder that holds it, or "
            "install it"
        ) from error
    except AttributeError as error:
        raise FactoryError(
            f"{module_name} has no {attribute!r}; name a class or function"
        ) from error
    except OSError as error:
        raise _missing_file(target, error) from error
    return _call(factory, target, arguments)


def _call(factory: Callable[..., Any], target: str, arguments: Mapping[str, Any]) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    try:
        module = factory(**arguments)
    except TypeError as error:
        raise FactoryError(
            f"{target} cannot be called ({error}); give its arguments with --arg name=value"
        ) from error
    except OSError as error:
        raise _missing_file(target, error) from error
    if not isinstance(module, nn.Module):
        raise FactoryError(f"{target} returns a {type(module).__name__}, not an nn.Module")
    return module


def _missing_file(target: str, error: OSError) -> FactoryError:
    return FactoryError(
        f"{target} asks for what it does not get ({error}); run from the folder that it expects"
    )


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load the weights at `path`, which torch.save wrote, into `module`.

    Takes a state_dict, or one under "state_dict", "model_state_dict" or "model".
    Loads weights only: nothing in the file is run. Raises CheckpointError.
    """
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
    """The weights in a checkpoint or .safetensors file, by name. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return read_safetensors(file.read(), path)
            content = _read(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return _find_weights(content, path)


def _read(file: BinaryIO, path: Path) -> object:
    """What torch.save wrote to `file`, without running anything of it."""
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


def make_input(description: str) -> tuple[str, Tensor]:
    """The name and the tensor that "x:float32:1,10,8" describes. Raises InputError."""
    name, _, rest = description.partition(":")
    type_name, _, sizes = rest.partition(":")
    dtype = getattr(torch, type_name, None)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", sizes) or not isinstance(dtype, torch.dtype):
        raise InputError(
            f"{description!r} is not NAME:TYPE:SHAPE, such as x:float32:1,10,8 (batch and time "
            "are part of the shape)"
        )
    return name, torch.zeros([int(size) for size in sizes.split(",")], dtype=dtype)


def guess_inputs(module: nn.Module) -> Tensor:
    """An input that `module` accepts, by what its first layers take: [2, 5] or [2, 5, features].

    Raises InputError when none does.
    """
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    tried: list[Tensor] = []
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            tried.append(torch.zeros(2, 5, dtype=torch.int64))
        elif isinstance(layer, nn.Linear):
            tried.append(torch.zeros(2, 5, layer.in_features, dtype=dtype))
        elif isinstance(layer, nn.Conv1d):
            tried.append(torch.zeros(2, 5, layer.in_channels, dtype=dtype))
        elif isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            tried.append(torch.zeros(2, 5, layer.input_size, dtype=dtype))
    for example in tried:
        try:
            with torch.no_grad():
                module(example)
        except REFUSALS:
            continue
        return example
    raise InputError(
        f"what {type(module).__name__}.forward takes cannot be told from its layers; describe "
        "each argument, in order, such as --input x:float32:2,5,8 (name, type, and a shape that "
        "forward accepts, batch and time included)"
    )
