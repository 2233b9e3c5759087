"""Triton kernels compiled for GPUs that are not here: what the compilers made of them, and the table to hold them to.

    python -m tests.kernels.aot            says what each kernel became, as JSON
    python -m tests.kernels.aot --write    makes that the table

Runs without `TRITON_INTERPRET`, so in a process of its own. A case is one launch as serving makes it: the types of its
arguments, its constants, and which of its arguments are multiples of 16, as the launcher would find.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("compiled.json")
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""That a block may have."""
_REGISTERS = {"sm_80": 65_536, "sm_90": 65_536, "sm_100": 65_536}
_WARPS = 64
"""That a multiprocessor may hold, with so many registers."""


@dataclass(frozen=True)
class Case:
    name: str
    kernel: str
    """Module and function."""
    types: dict[str, str]
    """Of the arguments that are not constants."""
    constants: dict[str, Any]
    num_warps: int
    odd: tuple[str, ...] = ("floor", "eps")
    """Arguments that are no multiples of 16."""
    tensor_cores: bool = False


def cases() -> list[Case]:
    from lattice_serve.kernels.mixer import MixerShape, StateLayout
    from lattice_serve.kernels.mixer.triton_parts import geometry

    made = []
    modules = "lattice_serve.kernels.mixer.triton_"
    numbers = {"floor": "fp32", "eps": "fp32", "z_stride": "i32", "out_stride": "i32", "row_size": "i32"}
    for d, pool in ((64, "fp32"), (64, "bf16"), (128, "fp32")):
        shape = MixerShape(H=12, d=d, m=d, C=16, taps=4, objective="decoding", use_forget_gate=True, norm_eps=1e-6)
        constants = geometry(StateLayout(shape, 12))
        types = numbers | {"o_layer": "i32", "p_bias": "*fp32", "p_norm": "*fp32", "p_z": "*bf16", "p_out": "*bf16"}
        types |= {"p_pool": f"*{pool}", "p_rows": "*i64", "p_positions": "*i64"}
        name = f"d = m = {d}, state {pool}, activations bf16"
        decode = f"{modules}decode:_mix_token"
        made.append(
            Case(f"decode, {name}", decode, types | {"p_conv": "*fp32"}, constants | {"b_s": 16}, 4 if d == 64 else 8)
        )
        if pool == "fp32":
            prefill = f"{modules}prefill:_mix_chunks"
            types |= {"p_u": "*fp32", "p_starts": "*i64"}
            constants = constants | {"b_t": 16, "precision": "tf32x3"}
            made.append(Case(f"prefill, {name}", prefill, types, constants, 8, tensor_cores=True))
    return made


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """Registers, spills, shared memory, and what there is of instructions of interest."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), function)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    constants = {name: value for name, value in case.constants.items() if name in names}
    num_warps = case.num_warps
    if TARGETS[target][0] == "hip" and "precision" in constants:  # as the launcher does there
        constants["precision"] = "ieee"
        num_warps = 4 if constants["d"] == 64 else num_warps
    attrs = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in case.constants and name not in case.odd
    }
    source = ASTSource(kernel, signature, constants, attrs)
    made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": num_warps})
    facts: dict[str, Any] = {"shared": made.metadata.shared}
    if TARGETS[target][0] == "cuda":
        facts |= _cuda(made.asm["cubin"])
        registers = -(-facts["registers"] // 8) * 8 * 32 * num_warps
        facts["warps"] = min(_WARPS, _REGISTERS[target] // registers * num_warps)
    else:
        facts |= _amd(made.asm["amdgcn"])
    return facts


def _cuda(cubin: bytes) -> dict[str, Any]:
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
        "wide_loads": len(re.findall(r"LDG\.E\S*\.128", sass)),
        "wide_stores": len(re.findall(r"STG\.E\S*\.128", sass)),
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|QGMMA|WGMMA|UTCMMA)", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    }


def _amd(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size"),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)),
        "tensor_cores": len(re.findall(r"v_mfma", assembly)),
    }


def compile_all() -> dict[str, dict[str, dict[str, Any]]]:
    """Case -> target -> facts."""
    jobs = [(case, target) for case in cases() for target in TARGETS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        facts = pool.map(compile_case, *zip(*jobs, strict=True))
        made: dict[str, dict[str, dict[str, Any]]] = {}
        for (case, target), found in zip(jobs, facts, strict=True):
            made.setdefault(case.name, {})[target] = found
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make it the table")
    options = parser.parse_args()
    text = json.dumps(compile_all(), indent=2) + "\n"
    if options.write:
        TABLE.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
