"""Triton kernels compiled for GPUs that are not here: what the compilers made of them, and the table to hold them to.

    python -m tests.kernels.aot            says what each kernel became, as JSON
    python -m tests.kernels.aot --write    makes that the table

Runs without `TRITON_INTERPRET`, so in a process of its own. What is compiled is what serving launches: networks of some
shapes run on tensors that have no memory, and each launch on the way is written down instead of made, with its types,
constants and options, and which of its arguments are multiples of 16. So a case cannot differ from its launch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor

Table: TypeAlias = "dict[str, dict[str, dict[str, int]]]"
"""Target -> case -> facts."""
TABLE = Path(__file__).with_name("compiled.json")
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""That a block may have."""
_REGISTERS, _WARPS = 65_536, 64
"""That a multiprocessor of NVIDIA's has, and may hold."""
_ANY = {"H", "N", "K", "steps", "part", "n", "head_size", "places", "o_tail", "tile_places", "tile_size"}
"""Constants that follow from the size of a model: launches that differ in nothing else are one case."""
_TOLD = ("P", "C", "d", "use_forget_gate", "scaled", "b_n", "b_m")
"""Constants that names tell."""
_PRODUCTS = ("linear", "gated_linear", "advance", "read")
"""Kernels that multiply matrices."""
_ACTIVATIONS = ("linear", "gated_linear", "read")
"""Kernels that store activations alone, as products have laid them out: on AMD 8 bytes of bfloat16 at a time."""


@dataclass(frozen=True)
class Model:
    """One whose launches are compiled; letters as in `MixerShape`."""

    hidden: int = 768
    inner: int = 2048
    H: int = 12
    d: int = 64
    C: int = 16
    forgets: bool = True
    dtype: torch.dtype = torch.bfloat16
    quantization: Literal["int8"] | None = None
    shares: int = 1


MODELS = (
    Model(),
    Model(d=128, H=16, hidden=2048, inner=5632),
    Model(d=32),
    Model(C=1),
    Model(forgets=False),
    Model(dtype=torch.float32),
    Model(quantization="int8"),
    Model(shares=2),
)


@dataclass(frozen=True)
class Launch:
    module: str
    function: str
    types: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def told(self) -> dict[str, Any]:
        """Its constants by name."""
        names = list(self.types)
        return {names[place[0]]: value for place, value in self.constants.items() if len(place) == 1}

    @property
    def key(self) -> str:
        """The same for launches that are one case."""
        constants = {name: value for name, value in self.told.items() if name not in _ANY}
        names = list(self.types)
        attributes = {names[place[0]]: value for place, value in self.attributes.items() if names[place[0]] not in _ANY}
        return repr((self.module, self.function, self.types, constants, attributes, self.options))

    @property
    def name(self) -> str:
        pointers = [kind[1:] for kind in self.types.values() if kind.startswith("*") and kind != "*i64"]
        constants = [f"{name} {self.told[name]}" for name in _TOLD if name in self.told]
        return f"{self.function.strip('_')}: {', '.join([*constants, ' '.join(pointers)])}"


class _Recorder:
    """Takes the place of `JITFunction.run`, for one target."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend

        self.launches: dict[str, Launch] = {}
        self._backend = make_backend(GPUTarget(*TARGETS[target]))

    def __call__(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        from triton.runtime.jit import create_function_from_signature

        bind = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        bound, kinds, options = bind(*arguments, **named)
        options, types, constants, attributes = kernel._pack_args(self._backend, named, bound, kinds, options)
        launch = Launch(kernel.fn.__module__, kernel.fn.__name__, types, constants, attributes, options.__dict__)
        self.launches.setdefault(launch.key, launch)


@cache
def launches(target: str) -> dict[str, Launch]:
    """By name, each once, of all `MODELS` on a target."""
    from triton.runtime.jit import JITFunction

    from lattice_serve.kernels.linear import tiles, triton
    from lattice_serve.kernels.mixers.lattice.triton import prefill as triton_prefill
    from lattice_serve.kernels.mixers.lattice.triton import prepare as triton_prepare
    from lattice_serve.kernels.triton import dependent_launch as dependent

    recorder = _Recorder(target)
    prefill = (triton_prepare.prepare_options, triton_prefill.advance_options, triton_prefill.read_options)
    for known in (tiles.architecture, triton._plan, dependent.dependent, *prefill):
        known.cache_clear()  # a process has one kind of device otherwise
    kind, number, _ = TARGETS[target]
    capability = divmod(int(number), 10) if kind == "cuda" else (9, 4)
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", lambda *a, **named: recorder(*a, **named)))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device=None: capability))
        stack.enter_context(patch.object(torch.version, "hip", "7.0" if kind == "hip" else None))
        stack.enter_context(patch.object(dependent, "driver_version", lambda: 13_000))
        stack.enter_context(torch.device("meta"))
        for model in MODELS:
            _run(model)
    named: dict[str, Launch] = {}
    for launch in recorder.launches.values():
        same = sum(name.partition(" #")[0] == launch.name for name in named)
        named[f"{launch.name} #{same + 1}" if same else launch.name] = launch
    return named


def _run(model: Model) -> None:
    """Steps of decode and of prompts, of few tokens and of many: tiles may go by their number."""
    from lattice_serve.engine.models.lattice.config import LatticeConfig
    from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
    from lattice_serve.kernels.decoder.triton_network import TritonNetwork
    from lattice_serve.kernels.mixers.chunks import DeviceSegments
    from lattice_serve.kernels.mixers.lattice import StateLayout

    config = LatticeConfig(
        vocab_size=32_000,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_hidden_layers=2,
        num_heads=model.H,
        head_dim=model.d,
        num_slots=model.d,
        chunk_size=model.C,
        use_forget_gate=model.forgets,
    )
    lm = LatticeForCausalLM(config).requires_grad_(False)
    for module in [lm, *lm.modules()]:
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("weight", "embedding"):
                setattr(module, name, torch.nn.Parameter(parameter.to(model.dtype), requires_grad=False))
    layout = StateLayout(lm.shape, 2)
    pool = torch.empty(64, layout.row_size)

    def gather(part: Tensor) -> Tensor:
        return part.expand(model.shares, -1, -1).contiguous()

    network = TritonNetwork(
        lm.decoder_weights(),
        layout,
        pool,
        quantization=model.quantization,
        gather=gather if model.shares > 1 else None,
    )
    for count in (1, 24, 100, 256):
        rows = torch.empty(count, dtype=torch.int64)
        network.decode(rows, rows, rows, torch.empty(count, 32_000))
    for count, n in ((24, 1), (299, 2), (512, 16)):
        segments = DeviceSegments(rows[:n], rows[:n], rows[: n + 1], rows[:n], rows[: 5 * n])
        network.logits(network.prefill(torch.empty(count, dtype=torch.int64), segments)[:n])


def compile_launch(target: str, name: str) -> dict[str, int]:
    """Registers, spills, shared memory, and what there is of instructions of interest."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = launches(target)[name]
    kernel = getattr(importlib.import_module(launch.module), launch.function)
    source = ASTSource(kernel, launch.types, launch.constants, launch.attributes)
    made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options)
    facts: dict[str, int] = {"shared": made.metadata.shared}
    facts |= _cuda(made.asm["cubin"]) if TARGETS[target][0] == "cuda" else _amd(made.asm["amdgcn"])
    facts["warps"] = _warps(target, facts, made.metadata.num_warps)
    return facts


def _warps(target: str, facts: dict[str, int], num_warps: int) -> int:
    """That a multiprocessor can hold at once, of its registers and shared memory."""
    if TARGETS[target][0] == "cuda":
        blocks = _REGISTERS // (-(-facts["registers"] // 8) * 8 * 32 * num_warps)
    else:  # four groups of lanes, 512 registers each lane, 8 warps each group
        blocks = 4 * min(8, 512 // (-(-max(1, facts["registers"]) // 8) * 8)) // num_warps
    if facts["shared"]:
        blocks = min(blocks, SHARED_BYTES[target] // facts["shared"])
    return min(_WARPS, blocks * num_warps)


def _cuda(cubin: bytes) -> dict[str, int]:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        options: dict[str, Any] = {"check": True, "capture_output": True, "text": True}
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], **options).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], **options).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "wide_loads": len(re.findall(r"(?:LDG|LDGSTS)\.E\S*\.128|UTMALDG", sass)),
        "wide_stores": len(re.findall(r"STG\.E\S*\.128|UTMASTG", sass)),
        "stores": len(re.findall(r"\bSTG\.|UTMASTG", sass)),
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|QGMMA|WGMMA|UTCMMA)", sass)),
    }


def _amd(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"),
        "spilled": number("private_segment_fixed_size"),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_(?:lds_)?dwordx4", assembly)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)),
        "stores": len(re.findall(r"(?:global|buffer)_store_", assembly)),
        "tensor_cores": len(re.findall(r"v_mfma", assembly)),
    }


def compile_all() -> Table:
    jobs = [(target, name) for target in TARGETS for name in launches(target)]
    made: Table = {target: {} for target in TARGETS}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (target, name), facts in zip(jobs, pool.map(compile_launch, *zip(*jobs, strict=True)), strict=True):
            made[target][name] = facts
    return made


def faults(made: Table) -> Iterator[tuple[str, str, str, int]]:
    """(target, case, fact, its value) of what a kernel should not have become."""
    for target, cases in made.items():
        for name, facts in cases.items():
            kernel = name.partition(":")[0]
            wanted = {"spilled": facts["spilled"] == 0, "shared": facts["shared"] <= SHARED_BYTES[target]}
            # Without any store, it is no kernel: where it cannot go on, a compiler may leave a trap, and say nothing.
            wanted |= {"stores": facts["stores"] > 0, "wide_loads": facts["wide_loads"] > 0}
            if kernel not in _ACTIVATIONS:
                wanted["wide_stores"] = facts["wide_stores"] > 0
            if kernel in _PRODUCTS and not (kernel.endswith("linear") and " fp32 fp32 fp32 fp32" in name):
                wanted["tensor_cores"] = facts["tensor_cores"] > 0
            yield from ((target, name, fact, facts[fact]) for fact, holds in wanted.items() if not holds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make it the table, with the reasons that are known")
    options = parser.parse_args()
    made = compile_all()
    if options.write:
        known = json.loads(TABLE.read_text())["exceptions"]
        exceptions: dict[str, dict[str, Any]] = {}
        for target, name, fact, value in faults(made):
            reason = known.get(target, {}).get(name, {}).get("reason", "")
            exceptions.setdefault(target, {}).setdefault(name, {"reason": reason})[fact] = value
            if not reason:
                print(f"{target}: {name}: {fact} is {value}: write the reason into the table", file=sys.stderr)
        TABLE.write_text(json.dumps({"exceptions": exceptions, "compiled": made}, indent=1) + "\n")
    print(json.dumps(made))


if __name__ == "__main__":
    main()
