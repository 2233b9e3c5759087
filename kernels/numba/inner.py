"""The decorator of functions that compiled code alone calls."""

from __future__ import annotations

from functools import partial
from typing import Any

from numba import njit

njit_inner: Any = partial(njit, cache=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""`numba.njit` without what Python needs to call the function, which tuples of arrays make long.

A step compiles in 13 s of processor time (was 15.5). Python must not call such a function.
"""
