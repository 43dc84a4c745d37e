"""The proofs of a graph: parity with a reference, leaks between rows, equal bits, smallest sizes.

Imports none of the other packages: what is proven, and against what, is given to it.
"""
