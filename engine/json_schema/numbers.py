"""Bounds of numbers, as llguidance can take them: it computes with 64-bit floats and 64-bit integers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

BOUNDS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])

_LARGEST = 2**63 - 1024
"""The largest 64-bit integer that is a 64-bit float, too."""
_LARGE = 10**18
"""From here on, llguidance needs a bound on the other side."""
_EXACT = 2**53


def bounds(schema: dict[str, Any], *, integer: bool) -> dict[str, Any]:
    """Returns the bounds to give instead of the schema's own: the same, or narrower where numbers get very large.

    Raises `ValueError` where they admit very large numbers alone.
    """
    lower = _Bound(schema, "minimum", "exclusiveMinimum", 1)
    upper = _Bound(schema, "maximum", "exclusiveMaximum", -1)
    for bound in lower, upper:
        if bound.value is not None and bound.sign * bound.value > _LARGEST:
            raise ValueError(
                f"{bound.name} {str(bound.value)[:50]} admits only numbers beyond 64 bits: give a nearer bound"
            )
    kept: dict[str, Any] = {}
    for bound, other in (lower, upper), (upper, lower):
        value = bound.value
        if value is None:
            if other.value is None or abs(other.value) < _LARGE or other.sign * other.value < 0:
                continue
            value = -bound.sign * _LARGEST
        if bound.sign * value < -_LARGEST:
            # Of integers, llguidance knows the largest one by the float after it.
            kept[bound.name] = 2**63 - 1 if integer and value >= 2**63 - 1 else -bound.sign * _LARGEST
        elif integer:
            kept[bound.name] = _inward(bound.whole(value), bound.sign)
        else:
            kept[bound.exclusive_name if bound.exclusive else bound.name] = value
    return kept


class _Bound:
    """The narrower one of two keywords. sign: 1 for a lower bound, -1 for an upper one."""

    def __init__(self, schema: dict[str, Any], name: str, exclusive_name: str, sign: int) -> None:
        self.name, self.exclusive_name, self.sign = name, exclusive_name, sign
        self.value: int | float | None = _number(schema, name)
        self.exclusive = False
        exclusive = schema.get(exclusive_name)
        if isinstance(exclusive, bool):  # as draft 4 has it
            self.exclusive = exclusive and self.value is not None
        elif exclusive is not None:
            value = _number(schema, exclusive_name)
            assert value is not None
            if self.value is None or sign * value >= sign * self.value:
                self.value, self.exclusive = value, True

    def whole(self, value: int | float) -> int:
        """Returns the first integer within a bound at `value`."""
        exact = Fraction(value)
        first = math.ceil(exact) if self.sign > 0 else math.floor(exact)
        return first + self.sign if self.exclusive and first == exact else first


def _number(schema: dict[str, Any], name: str) -> int | float | None:
    value = schema.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"{name} is {str(value)[:50]!r}: give a number")
    return value


def _inward(value: int, sign: int) -> int:
    """Returns the integer itself, or the nearest one within the bound that a float holds."""
    if abs(value) <= _EXACT:
        return value
    near = float(value)
    while sign * int(near) < sign * value:
        near = math.nextafter(near, sign * math.inf)
    return int(near)
