"""One sequence through an exported file in plain ONNX Runtime; imports nothing of ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime


def run_alone(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs [steps, …] of one sequence [steps, …], as the file's own metadata says.

    Whole where the file has a time axis, else step by step. The row stands in a batch
    of as many equal rows as the file asks for.
    """
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    contract: dict[str, Any] = json.loads(properties["sluice.contract"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = contract.get("batch_min", 1)
    steps = len(next(iter(inputs.values())))
    is_one_step = contract.get("is_one_step", False)
    state = np.tile(_initial(contract), (rows, 1))
    pieces: dict[str, list[np.ndarray]] = {}
    width = 1 if is_one_step else steps
    for start in range(0, steps, width):
        feed = {contract["state_input"]: state}
        for spec in contract["inputs"]:
            array = np.stack([inputs[spec["name"]][start : start + width]] * rows)
            feed[spec["name"]] = _place(array, spec, is_one_step=is_one_step)
        if contract.get("lengths_input"):
            feed[contract["lengths_input"]] = np.full(rows, width, np.int32)
        names = [spec["name"] for spec in contract["outputs"]]
        *results, state = session.run([*names, contract["state_output"]], feed)
        for spec, result in zip(contract["outputs"], results, strict=True):
            row = _lift(result, spec, is_one_step=is_one_step)
            pieces.setdefault(spec["name"], []).append(row)
    return {name: np.concatenate(rows) for name, rows in pieces.items()}


def _initial(contract: dict[str, Any]) -> np.ndarray:
    """The state before the first step: [1, state_size]."""
    row = np.zeros((1, contract["state_size"]), np.float32)
    for part in contract["state"]:
        offset, values = part.get("offset", 0), part.get("initial", [])
        row[0, offset : offset + len(values)] = values
    return row


def _place(array: np.ndarray, spec: dict[str, Any], *, is_one_step: bool) -> np.ndarray:
    """[batch, steps, …] in the shape that the file takes."""
    batch = spec.get("batch_axis", 0)
    if is_one_step:
        return np.moveaxis(array[:, 0], 0, batch)
    return np.moveaxis(array, (0, 1), (batch, spec.get("time_axis", 0)))


def _lift(result: np.ndarray, spec: dict[str, Any], *, is_one_step: bool) -> np.ndarray:
    """What the file gives for the first row: [steps, …]."""
    batch = spec.get("batch_axis", 0)
    if is_one_step:
        return np.moveaxis(result, batch, 0)[:1]
    return np.moveaxis(result, (batch, spec.get("time_axis", 0)), (0, 1))[0]
