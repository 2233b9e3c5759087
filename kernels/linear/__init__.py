"""Matrix products whose rows have the same bits at any number of rows."""

from lattice_serve.kernels.linear.row_invariant import RowInvariantLinear

__all__ = ["RowInvariantLinear"]
