"""From a PyTorch module to an ONNX graph, its contract and the reference that proofs compare with.

Imports `proof` and the files at the root that know no package; never `onnx`.
"""
