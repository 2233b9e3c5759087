"""What the engine asks of a network: the torch reference of a family, and the compiled step where it has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from lattice_serve.engine.models.base import ModelConfig

if TYPE_CHECKING:
    from lattice_serve.engine.backend import Backend

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""A tensor [1, ...] of this process's share of the model -> [shares, ...], always in one order."""


class RaggedBatch(Protocol):
    """The operations of a forward pass over the tokens of several sequences, one segment after another.

    They give a token the same bits whatever else is in the batch.
    """

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, k], weight [n, k] -> [T, n]."""
        ...

    def add(self, x: Tensor, product: Tensor) -> Tensor:
        """Returns the residual stream x with what a projection adds to it, in all shares of the model."""
        ...

    def scan(self, x: Tensor, width: int, recur: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """x [T, k] -> [T, width], by a recurrence over each sequence's tokens.

        `recur(x, row, position)` gives the outputs [t, width] of t tokens of one sequence that has seen `position`
        tokens, and moves its state `row` [row_size] float32 on in place.
        """
        ...


class CausalLM(nn.Module, ABC):
    """A network whose past is a state row: `row_size` floats a sequence, whatever its length.

    Parameters are float32 on the default device until loaded or moved; see `engine.weights`.
    """

    config_class: ClassVar[type[ModelConfig]]
    config: ModelConfig

    @property
    @abstractmethod
    def row_size(self) -> int:
        """Floats of a state row."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """[vocab_size, hidden_size]"""

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Fill the parameters with random values; the same seed gives the same ones."""

    @abstractmethod
    def initial_row(self) -> Tensor:
        """Returns the state [row_size] float32 on the CPU before the first token."""

    @abstractmethod
    def run(self, tokens: Tensor, batch: RaggedBatch) -> Tensor:
        """tokens [T] int64 of a ragged batch -> final hidden states [T, hidden_size]; moves its state rows on."""

    def compile_step(
        self,
        pool: Tensor,
        *,
        max_tokens: int,
        threads: int,
        parallel_from: int,
        quantization: Literal["int8"] | None,
        gather: Gather | None,
    ) -> Backend | None:
        """Returns the compiled step for the device of `pool` [rows, row_size]; None where the family has none there.

        The step may take the matrices for its own: of the model, only the small tensors are used afterwards. Steps of
        fewer multiply-adds than `parallel_from` run in one thread. gather: for a share of a model.
        """
        return None
