"""A team of threads that work through the items of a step together, phase after phase.

Every thread runs the same compiled function. The items of all phases of a step are numbered through; a thread takes the
next number (a *ticket*), waits until everything before that item's phase is done, and does the item. So no thread waits
for another that has nothing in hand: one that the system has taken off its core, or that comes late, costs no more than
the item it holds. Between steps the others look out for the next one for a short while, then sleep.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from lattice_serve.kernels.numba.types import Ints, UBytes

_TICKET, _DONE, _OPEN, _INSIDE, _ASLEEP = 0, 8, 16, 24, 32
"""Places in the shared int64 array, each on a cache line of its own: the next item, items done, number of the step that
may be entered (0: none), threads inside it, and from there on whether each thread sleeps."""
_LOOKS_A_YIELD = 64
_YIELDS_BEFORE_SLEEP = 500
"""A thread without work gives way to others that many times, a fraction of a millisecond, before it sleeps."""

_HINTS = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]),
}
"""How a processor is told that a thread only looks."""

_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_read = types.ExternalFunction("read", types.intp(types.int32, types.uintp, types.uintp))


def _atomic(build: Any, returns: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, place, *rest = values
        pointer = builder.gep(context.make_array(signature.args[0])(context, builder, array).data, [place])
        result = build(builder, pointer, *rest)
        return context.get_dummy_value() if returns is types.void else result

    return codegen


@intrinsic
def _add(typingctx: Any, array: Any, place: Any, value: Any) -> Any:
    """array[place] += value in one indivisible step; what it was before."""
    build = lambda builder, pointer, value: builder.atomic_rmw("add", pointer, value, "seq_cst")  # noqa: E731
    return types.int64(array, types.intp, types.int64), _atomic(build, types.int64)


@intrinsic
def _swap(typingctx: Any, array: Any, place: Any, value: Any) -> Any:
    """array[place] = value in one indivisible step; what it was before."""
    build = lambda builder, pointer, value: builder.atomic_rmw("xchg", pointer, value, "seq_cst")  # noqa: E731
    return types.int64(array, types.intp, types.int64), _atomic(build, types.int64)


@intrinsic
def _get(typingctx: Any, array: Any, place: Any) -> Any:
    """array[place], and all that was written before it."""
    build = lambda builder, pointer: builder.load_atomic(pointer, "seq_cst", 8)  # noqa: E731
    return types.int64(array, types.intp), _atomic(build, types.int64)


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the processor that this thread only looks."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        module = builder.module
        for target, (name, arguments) in _HINTS.items():
            if module.triple.startswith(target):
                kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
                builder.call(module.globals.get(name) or ir.Function(module, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), codegen


@njit(cache=True)
def _look_again(looks: int) -> int:
    """Let a moment pass between looks, and others have the processor after some of them; their number."""
    _pause()
    looks += 1
    if looks % _LOOKS_A_YIELD == 0:
        _sched_yield()
    return looks


@njit(cache=True)
def take(sync: Ints) -> int:
    """The next ticket of the step."""
    return _add(sync, _TICKET, 1)


@njit(cache=True)
def finish(sync: Ints) -> int:
    """The item in hand is done; the next ticket."""
    _add(sync, _DONE, 1)
    return _add(sync, _TICKET, 1)


@njit(cache=True)
def wait_for(sync: Ints, items: int) -> None:
    """Until so many items of the step are done."""
    looks = np.int64(0)
    while _get(sync, _DONE) < items:
        looks = _look_again(looks)


@njit(cache=True)
def enter(sync: Ints, last: int, member: int, pipe: int, byte: UBytes) -> int:
    """Wait for a step other than `last` and go inside; its number, or -1 when the team is dissolved."""
    looks = np.int64(0)
    while True:
        step = _get(sync, _OPEN)
        if step < 0:
            return -1
        if step not in (0, last):
            _add(sync, _INSIDE, 1)
            if _get(sync, _OPEN) == step:
                return step
            _add(sync, _INSIDE, -1)  # it was closed meanwhile
            continue
        looks = _look_again(looks)
        if looks == _LOOKS_A_YIELD * _YIELDS_BEFORE_SLEEP:
            looks = 0
            _swap(sync, _ASLEEP + member, 1)
            # Who opens a step looks for sleepers after that: either it sees this one, or this one sees the step.
            if _get(sync, _OPEN) in (0, last) or _swap(sync, _ASLEEP + member, 0) == 0:
                _read(pipe, byte.ctypes.data, 1)


@njit(cache=True)
def leave(sync: Ints) -> None:
    """Be done with a step that was entered."""
    _add(sync, _INSIDE, -1)


@njit(cache=True)
def _open(sync: Ints, step: int, members: int) -> int:
    """Let a step begin; which of the members are to be woken, a bit each."""
    sync[_TICKET] = 0
    sync[_DONE] = 0
    _swap(sync, _OPEN, step)
    asleep = 0
    for member in range(members):
        asleep |= _swap(sync, _ASLEEP + member, 0) << member
    return asleep


@njit(nogil=True, cache=True)
def _close(sync: Ints) -> None:
    """Let nobody in any more, and wait until all are out."""
    _swap(sync, _OPEN, 0)
    looks = np.int64(0)
    while _get(sync, _INSIDE) > 0:
        looks = _look_again(looks)


class ThreadTeam:
    """`size` threads, the caller's among them, that run `serve`.

    serve(sync, member, pipe, byte, *arguments) is compiled and gives the interpreter's lock away. For member 0, the
    caller, it does the items of a step that was opened; for another it enters step after step, does them and leaves,
    until there are no more. The arguments are the same for every step: what changes is written into their arrays.
    """

    def __init__(self, size: int, serve: Any, arguments: tuple[Any, ...]) -> None:
        self.size = size
        self._serve, self._arguments = serve, arguments
        self._sync = np.zeros(_ASLEEP + size, dtype=np.int64)
        self._byte = np.zeros(1, dtype=np.uint8)
        self._steps = 0
        self._pipes: list[tuple[int, int]] = []

    def run(self, threads: int) -> None:
        """One step, by one thread or by all."""
        if threads == 1 or self.size == 1:
            _open(self._sync, 0, 0)
            self._serve(self._sync, 0, 0, self._byte, *self._arguments)
            return
        if not self._pipes:
            self._gather()
        self._steps += 1
        asleep = _open(self._sync, self._steps, self.size)
        for member, (_, end) in enumerate(self._pipes, 1):
            if asleep >> member & 1:
                os.write(end, b"!")
        self._serve(self._sync, 0, 0, self._byte, *self._arguments)
        _close(self._sync)

    @property
    def sleepers(self) -> int:
        """Members that sleep: the next step will wake them."""
        return int(self._sync[_ASLEEP:].sum())

    def _gather(self) -> None:
        self._pipes = [os.pipe() for _ in range(self.size - 1)]
        threads = []
        for member, (end, _) in enumerate(self._pipes, 1):
            byte = np.zeros(1, dtype=np.uint8)
            arguments = (self._sync, member, end, byte, *self._arguments)
            threads.append(threading.Thread(target=self._serve, args=arguments, daemon=True))
        for thread in threads:
            thread.start()
        weakref.finalize(self, _dissolve, self._sync, self._pipes, threads)


def _dissolve(sync: Ints, pipes: list[tuple[int, int]], threads: list[threading.Thread]) -> None:
    _open(sync, -1, 0)
    for _, end in pipes:
        os.write(end, b"!")
    for thread in threads:
        thread.join()
    for pipe in pipes:
        for end in pipe:
            os.close(end)
