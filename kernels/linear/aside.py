"""Work for vectors while the matrix unit multiplies, in turns: the unit leaves most of the processor idle.

A piece of work is a named tuple of what it needs. Who defines one says, by overloads of two functions for its type, how
many turns there are and what is done in one; None is no work.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import overload, register_jitable


def turns(work: Any) -> int:
    """How many turns there are; in compiled code only."""
    raise NotImplementedError


def take(work: Any, turn: int) -> None:
    """Take one of them; in compiled code only."""
    raise NotImplementedError


@register_jitable
def take_turns(work: Any, turn: int, count: int) -> int:
    """Take up to so many turns from `turn` on; the one that is next."""
    end = min(turn + count, turns(work))
    while turn < end:
        take(work, turn)
        turn += 1
    return turn


def _is_none(work: Any) -> bool:
    """Whether a type is that of no work."""
    return work is None or isinstance(work, types.NoneType) or (isinstance(work, types.Omitted) and work.value is None)


@overload(turns, strict=False)
def _no_turns(work: Any) -> Any:
    return (lambda work: 0) if _is_none(work) else None


@overload(take, strict=False)
def _take_none(work: Any, turn: Any) -> Any:
    return (lambda work, turn: None) if _is_none(work) else None
