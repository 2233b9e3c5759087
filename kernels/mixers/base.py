"""What a model family gives to be run: how its state lies in a row, and its mixer on each kind of device.

A mixer is the part of a layer between input and output projection; it alone reads and writes the state. To everybody
else the state of a sequence is one opaque row of float32, of `row_size` floats. A family's `StateLayout` is the handle
of all the rest: `on_cpu` and `on_gpu` return what a decoder takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lattice_serve.kernels.mixers.chunks import DeviceSegments
from lattice_serve.kernels.numba.types import Floats


class StateLayout(Protocol):
    """Where everything that a sequence remembers lies in its state row."""

    @property
    def layers(self) -> int: ...

    @property
    def row_size(self) -> int:
        """Floats of a row."""
        ...

    @property
    def row_bytes(self) -> int: ...

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk: where prefill may be cut without changing a token's bits; 1 means anywhere."""
        ...

    @property
    def out_width(self) -> int:
        """Columns of the mixer's output, on a GPU and in torch."""
        ...

    def initial(self, row: Tensor, layer: int, weights: Any) -> None:
        """Writes the state of a layer before the first token into row [row_size]; weights: the layer's mixer's."""
        ...

    def on_cpu(self) -> CpuMixer: ...

    def on_gpu(self) -> GpuMixer: ...


class CpuMixer(Protocol):
    """A family's mixer in Numba, head by head; `mix_head` is compiled for the type of `compiled`."""

    @property
    def compiled(self) -> Any:
        """A NamedTuple type of the family's own, passed to `mix_head`.

        It has at least `heads`, `head_width` (columns of z of a head), `head_size`, `layer_size` and `row_size` (floats
        of a head's block, of a layer and of a row of state): each head of a layer has a block of its own.
        """
        ...

    @property
    def in_width(self) -> int:
        """Columns of z, the packed input projection: those of each head, then what all heads share."""
        ...

    @property
    def out_width(self) -> int: ...

    @property
    def scratch_size(self) -> int:
        """Floats that `mix_head` needs of its thread."""
        ...

    def pack_inputs(self, weight: Tensor) -> Tensor:
        """Returns the input projection [in_width, hidden] in the order of z."""
        ...

    def pack_outputs(self, weight: Tensor) -> Tensor:
        """Returns the transposed output projection [out_width, hidden] in the order of the mixer's output."""
        ...

    def pack_weights(self, weights: Any) -> Floats:
        """Returns the small weights of a layer's mixer as one vector."""
        ...


class HeadInputs(NamedTuple):
    """What one head reads of the input projection, in compiled code: pointers to float32, and floats between tokens."""

    z: Floats
    """The head's own columns of token 0."""
    z_stride: int
    shared: Floats
    """Columns that all heads share, of token 0."""
    shared_stride: int


def mix_head(
    mixer: Any, state: Floats, position: int, first: int, last: int, inputs: HeadInputs, head: int, weights: Floats,
    out: Any, scratch: Floats,
) -> None:  # fmt: skip
    """Runs tokens `first` to `last` of one sequence, which has seen `position` tokens, through one head.

    In compiled code only: each family overloads it for the type of its `CpuMixer.compiled`, which is `mixer`. state is
    the head's block, weights what `pack_weights` returned, out the `linear.activations` of all tokens, scratch
    `scratch_size` floats; state, weights and scratch are pointers to float32.
    """
    raise NotImplementedError


class GpuMixer(Protocol):
    """A family's mixer in Triton: every tensor stays where it is, so a CUDA graph may hold each call."""

    def pack_weights(self, weights: Any) -> Any:
        """Returns the small weights of a layer's mixer as the kernels read them."""
        ...

    def decode(
        self, z: Tensor, pool: Tensor, layer: int, rows: Tensor, positions: Tensor, weights: Any, out: Tensor
    ) -> Tensor:
        """Runs one token of each of N sequences: z [N, in_width] -> out [N, out_width], which is returned.

        rows, positions [N] int64: the state row of each, which is updated, and the tokens it has seen; a row of -1 is
        none. The launch before must have written nothing but z.
        """
        ...

    def prefill(
        self, z: Tensor, pool: Tensor, layer: int, segments: DeviceSegments, weights: Any, out: Tensor
    ) -> Tensor:
        """Runs many tokens of each sequence: z [T, in_width] -> out [T, out_width], which is returned."""
        ...
