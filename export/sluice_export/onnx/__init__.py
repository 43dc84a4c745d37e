"""From an ONNX file made by others to a graph with one packed state, its contract and a reference.

Imports `proof` and the files at the root that know no package; never `torch`.
"""
