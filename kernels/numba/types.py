"""Names for what compiled code passes around, for readers and for the type checker; Numba infers its own types.

In compiled code an array [n] may also be a pointer that `vector.pointer` returns, which begins where it is wanted.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Int32s: TypeAlias = NDArray[np.int32]
Bytes: TypeAlias = NDArray[np.int8]
UBytes: TypeAlias = NDArray[np.uint8]
Records: TypeAlias = NDArray[np.void]
"""A structured array."""
Record: TypeAlias = Any
"""An element of one, whose fields have names."""

Strips: TypeAlias = Any
"""float32 [n], uint32 [n] with the bits of two bfloat16 an element, or int8 [n]: the type chooses what multiplies."""
Rows: TypeAlias = Any
"""Activations as the unit that multiplies reads them: `linear.activations` lists the types."""
Vector: TypeAlias = Any
"""16 float32 in a register: `vector.vector`."""
