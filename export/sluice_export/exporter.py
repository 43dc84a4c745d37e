"""Exports a module, or an ONNX file of others: converts it, proves it, and only then writes it."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx.shape_inference import InferenceError

from sluice_export.errors import InputError
from sluice_export.onnx.conversion import convert_file
from sluice_export.proof.evidence import TOLERANCE
from sluice_export.proof.proofs import Progress, prove
from sluice_model.errors import ModelError
from sluice_protos.contract_pb2 import ModelContract

if TYPE_CHECKING:
    from torch import nn

    from sluice_export.onnx.axes import Axes


def export(
    module: "nn.Module",
    example_inputs: object,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    output_names: Sequence[str] | None = None,
    valid: Mapping[str, tuple[int, int]] | None = None,
    tolerance: float = TOLERANCE,
    on_progress: Progress | None = None,
) -> ModelContract:
    """Write `module` to `path` as one ONNX file that Sluice serves, once it is proven equal.

    example_inputs  the arguments of forward: a tensor, a tuple of arguments or a dict of named
                    ones, [batch, steps, …] or [steps, batch, …] as the module takes them; the
                    sizes of batch and time do not matter, nor do float values. Arguments that
                    are no tensors are fixed at export
    name            of the model, for people; by default the file's name
    output_names    of the outputs, in order; by default "y"
    valid           (first, last) valid value of integer inputs, by name; by default found for
                    those that all go, unchanged, into nn.Embedding tables of one size
    tolerance       the largest difference to PyTorch, relative to the largest value

    The module is exported in eval mode (dropout off) and not changed. Returns the contract in
    the file. Raises ExportError, and then writes nothing.
    """
    # PyTorch is imported only where a module is exported: it takes seconds.
    from sluice_export.torch.conversion import convert_module

    path = Path(path)
    tell = on_progress or (lambda what, share: None)
    candidate = convert_module(
        module,
        example_inputs,
        name or path.stem,
        valid=valid or {},
        output_names=output_names,
        tell=tell,
    )
    prove(candidate, tolerance=tolerance, tell=tell)
    _write(candidate.proto, path)
    tell("done", 1.0)
    return candidate.contract


def export_onnx(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    states: Mapping[str, str] | None = None,
    fixed: Mapping[str, float] | None = None,
    axes: "Mapping[str, Axes] | None" = None,
    valid: Mapping[str, tuple[int, int]] | None = None,
    tolerance: float = TOLERANCE,
    on_progress: Progress | None = None,
) -> ModelContract:
    """Write the ONNX file `source` to `path` in the form that Sluice serves, once proven equal.

    name        of the model, for people; by default the file's name
    states      the output that each state input comes back as, where the file does not say:
                {"h": "h_out"}, or "stack[0]" for a part of an output
    fixed       the values of inputs of a single value: {"sr": 16000}
    axes        of inputs whose shape does not say them: {"x": ("batch", "steps", 80)}
    valid       (first, last) valid value of integer inputs, by name
    tolerance   the largest difference to the original file, relative to the largest value

    Returns the contract in the new file. Raises ExportError, and then writes nothing.
    """
    path = Path(path)
    tell = on_progress or (lambda what, share: None)
    try:
        candidate = convert_file(
            Path(source),
            name or path.stem,
            states=states or {},
            fixed=fixed or {},
            axes=axes or {},
            valid=valid or {},
            tolerance=tolerance,
            tell=tell,
        )
        prove(candidate, tolerance=tolerance, tell=tell)
    except (ModelError, InferenceError) as error:
        raise InputError(
            f"{source}: does not run in ONNX Runtime, which serves it ({error}); export it again "
            "with standard operators and opset 17, and see what onnx.checker says of it"
        ) from error
    _write(candidate.proto, path)
    tell("done", 1.0)
    return candidate.contract


def _write(proto: onnx.ModelProto, path: Path) -> None:
    """Write the whole file, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(proto.SerializeToString())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
