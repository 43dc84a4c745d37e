"""Makes a module from a factory, `package.module:factory`, and a checkpoint."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sluice_export.errors import FactoryError
from sluice_export.torch.checkpoint import load_checkpoint, read_weights
from sluice_export.torch.layer_from_weights import make_layer


def load_module(
    factory: str | None, arguments: Mapping[str, Any], checkpoint: Path | None
) -> nn.Module:
    """The module that `factory` makes, in eval mode, with the weights of `checkpoint`.

    Without a factory it is the recurrent layer that the checkpoint holds. Raises ExportError.
    """
    if factory is None and checkpoint is not None:
        return make_layer(read_weights(checkpoint), checkpoint, arguments)
    module = make_module(factory or "", arguments).eval()
    if checkpoint is not None:
        load_checkpoint(module, checkpoint)
    return module


def make_module(target: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Import `package.module:factory` and call it with `arguments`.

    The factory is a class or function that returns an nn.Module, or a module itself; the current
    folder is searched first. Raises FactoryError.
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
        f"{target} cannot read what it needs ({error}); run from the folder that it expects"
    )
