"""The proofs of a graph: parity with a reference, leaks between rows, equal bits, smallest sizes.

Imports only the files at the root that know no package.
"""
