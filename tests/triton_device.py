"""Where Triton's kernels are tested: on a GPU where there is one, else by its interpreter, on tensors of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    product = np.einsum("ik,kj->ij", a.data, b.data, dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


if DEVICE == "cpu":
    # The bits of a row of numpy's product of small matrices depend on the row's place, those of a GPU's do not.
    interpreter.InterpreterBuilder.create_dot = _create_dot
