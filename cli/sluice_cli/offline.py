"""Runs whole sequences, each alone, with plain ONNX Runtime: the reference for streamed outputs.

It imports nothing of Sluice, so it is independent: `python offline.py MODEL INPUTS OUTPUTS`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Arrays = dict[str, np.ndarray]
Contract = dict[str, Any]


def run_offline(model: Path, inputs: Path, outputs: Path) -> None:
    """Read `inputs` and write `outputs`, both .npz with tensors [steps, …] as `SEQUENCE/NAME`."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    written = session.get_modelmeta().custom_metadata_map.get("sluice.contract")
    if written is None:
        sys.exit(f"{model} has no contract; give the file that is served")
    contract = json.loads(written)
    sequences: dict[str, Arrays] = {}
    with np.load(inputs) as file:
        for key in file.files:
            sequence, _, name = key.partition("/")
            sequences.setdefault(sequence, {})[name] = file[key]
    names = {spec["name"] for spec in contract["inputs"]}
    found: dict[str, Any] = {}
    for sequence, arrays in sequences.items():
        if arrays.keys() != names:
            sys.exit(f"the model takes {sorted(names)}, not {sorted(arrays)}")
        for name, array in run_sequence(session, contract, arrays).items():
            found[f"{sequence}/{name}"] = array
    np.savez(outputs, **found)


def run_sequence(
    session: onnxruntime.InferenceSession, contract: Contract, arrays: Arrays
) -> Arrays:
    """The outputs of one sequence from the initial state. Arrays are [steps, …] by name.

    If exact bits need a larger batch or length, the sequence is repeated and padded with
    zeros.
    """
    steps = len(next(iter(arrays.values())))
    width = 1 if contract.get("is_one_step") else steps
    names = [spec["name"] for spec in contract["outputs"]]
    state_output = contract.get("state_output")
    state = initial_state(contract)
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, steps, width):
        feed = {
            spec["name"]: place(arrays[spec["name"]][start : start + width], spec, contract)
            for spec in contract["inputs"]
        }
        if contract.get("lengths_input"):
            feed[contract["lengths_input"]] = np.full(len(state), width, np.int32)
        if state_output:
            feed[contract["state_input"]] = state
        results = session.run([*names, *([state_output] if state_output else [])], feed)
        state = results[-1] if state_output else state
        for spec, result in zip(contract["outputs"], results, strict=False):
            pieces[spec["name"]].append(take(result, spec, contract)[:width])
    return {name: np.concatenate(rows) for name, rows in pieces.items()}


def initial_state(contract: Contract) -> np.ndarray:
    """The state before the first step: [batch, state_size] float32, each row the same."""
    row = np.zeros(contract.get("state_size", 0), np.float32)
    for part in contract.get("state", []):
        initial = part.get("initial", [])
        row[part.get("offset", 0) :][: len(initial)] = initial
    return np.tile(row, (contract["batch_min"], 1))


def place(array: np.ndarray, spec: dict[str, Any], contract: Contract) -> np.ndarray:
    """An input of one sequence, [steps, …], in the shape that the graph takes."""
    batch, time = spec.get("batch_axis", 0), spec.get("time_axis", 0)
    beyond = max(0, contract["length_min"] - len(array))
    array = np.pad(array, [(0, beyond)] + [(0, 0)] * (array.ndim - 1))
    if contract.get("is_one_step"):
        return np.stack([array[0]] * contract["batch_min"], axis=batch)
    return np.moveaxis(np.stack([array] * contract["batch_min"]), (0, 1), (batch, time))


def take(array: np.ndarray, spec: dict[str, Any], contract: Contract) -> np.ndarray:
    """The inverse of `place`: [steps, …] of the first row of an output."""
    batch, time = spec.get("batch_axis", 0), spec.get("time_axis", 0)
    if contract.get("is_one_step"):
        return np.moveaxis(array, batch, 0)[:1]
    row: np.ndarray = np.moveaxis(array, (batch, time), (0, 1))[0]
    return row


if __name__ == "__main__":
    run_offline(*map(Path, sys.argv[1:]))
