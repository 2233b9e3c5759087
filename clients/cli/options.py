"""Options and arguments that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer


class Dtype(str, Enum):
    """`EngineConfig.dtype`, as typer takes choices."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Quantization(str, Enum):
    """`EngineConfig.quantization`, as typer takes choices."""

    int8 = "int8"


ModelArgument: TypeAlias = Annotated[
    Path | None, typer.Argument(help="Model folder.", show_default="the small bundled model")
]
ModelOption: TypeAlias = Annotated[
    Path | None, typer.Option("--model", help="Model folder.", show_default="the small bundled model")
]
DtypeOption: TypeAlias = Annotated[Dtype | None, typer.Option("--dtype", help="Of the weights.", show_default="auto")]
QuantizationOption: TypeAlias = Annotated[
    Quantization | None, typer.Option("--quantization", help="Of the weights, at load.", show_default="none")
]
ThreadsOption: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of the kernels.", show_default="one a core")
]
