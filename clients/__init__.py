"""Clients of a lattice server: the Python client (`client`), the command `lattice` (`cli`), the benchmarks.

Nothing is imported here: the command must start quickly.
"""
