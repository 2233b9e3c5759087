"""Configuration of the engine. Unknown fields are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

DType: TypeAlias = Literal["float32", "bfloat16"]

SAVE_SECONDS = 60.0
"""In which an engine has to write its cached states, once its server is gone."""
_GPU_STEP_TOKENS = 2048


class EngineConfig(BaseModel):
    """What one engine process is told at start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; "auto": as they are stored. Sums are float32 either way."""
    quantization: Literal["int8"] | None = None
    """Of the matrices, at load, one scale an output: half the bytes of bfloat16."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Processes that share the model, each with as many heads and columns: a GPU each, from that of `device` on."""
    max_rows: int | None = Field(default=None, ge=1)
    """State rows. None: as many as `state_memory` holds, at most 256."""
    state_memory: int = Field(default=1 << 30, ge=1)
    """Bytes for the state pool when `max_rows` is not given."""
    max_step_tokens: int = Field(default=512, ge=1)
    """Tokens a step, prefill and decode together. By default 2048 on a GPU."""
    step_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds that a step may take while answers are under way: prompts are cut to fit. None: no such limit."""
    max_waiting: int = Field(default=1024, ge=0)
    """Sequences that may wait for a row; more are refused."""
    priority_scope: Literal["key", "server"] = "key"
    """Among whose requests `priority` acts: those of one API key, or all, with no fair shares of rows then."""
    speculative_tokens: int = Field(default=0, ge=0, le=64)
    """Next tokens to guess where a text repeats itself, and to check in one step: the same tokens, sooner. 0: none."""
    prefix_cache_memory: int = Field(default=1 << 30, ge=0)
    """Bytes of host memory for states of prompts and answers that may come again. 0: none are kept."""
    prefix_cache_device_memory: int = Field(default=256 << 20, ge=0)
    """Bytes of a GPU's memory, besides, for those of them that were used last."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the matrix products. None: one a core."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        # An H200 took a third less time for each of 2048 tokens of a prompt than for each of 512.
        if isinstance(given, dict) and given.get("device", "cpu") != "cpu":
            given = {"max_step_tokens": _GPU_STEP_TOKENS} | given
        return given

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.max_rows is not None and self.max_step_tokens < self.max_rows:
            raise ValueError(f"max_step_tokens ({self.max_step_tokens}) must be at least max_rows ({self.max_rows})")
        if self.tensor_parallel_size > 1 and self.speculative_tokens:
            raise ValueError("speculative_tokens do not go with tensor_parallel_size: leave one of them out")
        if self.tensor_parallel_size > 1 and self.quantization is not None and self.device == "cpu":
            raise ValueError("quantization does not go with tensor_parallel_size on a CPU: leave one of them out")
        return self
