"""The kernels on this machine's GPU: parity, then times beside their floors, plain torch and flash-linear-attention.

    python benchmarks/gpu.py [--sections tests parity mixer network profile engine]

Run once on a machine with a GPU. First every kernel is held to float64 (the tests that CI runs by Triton's interpreter
run on the GPU where there is one). Then times: medians of CUDA events around replays of one graph, so that launches
cost what they cost in serving, over all layers' states, so that what is read is not in the cache because it was just
there. Floors are the bytes and FLOPs of `benchmarks/roofline.py` over the ceilings measured here. Where the package
flash-linear-attention is installed, its gated delta rule is run at the same shape: it is the nearest relative that has
fast kernels, without this mixer's convolution, output norm and gate. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from roofline import MODELS, Device, decode_step, layout_of, mixer_decode_bytes, prefill
from torch import Tensor

from lattice_serve.engine.llm import LLM
from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.state_pool import MAX_ROWS
from lattice_serve.engine.weights import bundled_model, init_model
from lattice_serve.kernels.decoder.triton_network import TritonNetwork
from lattice_serve.kernels.decoder.weights import DecoderWeights, LayerWeights
from lattice_serve.kernels.mixers.chunks import DeviceSegments
from lattice_serve.kernels.mixers.lattice import MixerShape, MixerState, MixerWeights, StateLayout, mix
from lattice_serve.kernels.mixers.lattice.triton.decode import mix_decode
from lattice_serve.kernels.mixers.lattice.triton.prefill import mix_prefill
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.triton.graph import Graph

ROOT = Path(__file__).parents[1]
Figures = dict[str, float]


def seconds(call: Callable[[], object], repeats: int = 20, *, graph: bool = True) -> float:
    """Median on the device; `graph`: of a captured call."""
    if graph:
        call = Graph(call, torch.cuda.graph_pool_handle())
    call()
    taken = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(taken))


def measured_ceilings() -> Device:
    """A copy of 2 GB, read and written, and a product of bfloat16 on random numbers."""
    source = torch.randn(1 << 29, device="cuda")
    copied = torch.empty_like(source)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    bandwidth = 2 * source.nbytes / seconds(lambda: copied.copy_(source), graph=False)
    return Device(bandwidth, 2 * 8192**3 / seconds(lambda: square @ square, graph=False))


def random_weights(shape: MixerShape) -> MixerWeights:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda")

    return MixerWeights(
        conv=normal(shape.conv_width, shape.taps) * 0.5, gate_bias=normal(2 * shape.H),
        norm=1 + 0.1 * normal(shape.d), anchor=normal(shape.H, shape.d, shape.m),
    ).by_taps()  # fmt: skip


def pool_of(layout: StateLayout, weights: MixerWeights, rows: int) -> Tensor:
    """Rows at their start, every layer with the same memory."""
    row = torch.zeros(layout.row_size)
    small = MixerWeights(
        conv=weights.conv.cpu(), gate_bias=weights.gate_bias.cpu(), norm=weights.norm.cpu(), anchor=weights.anchor.cpu()
    )
    state = MixerState.initial(layout.shape, small, 1)
    for layer in range(layout.layers):
        layout.store(row, layer, state)
    return row.cuda().repeat(rows, 1)


def check_mixer(config: LatticeConfig) -> Figures:
    """Largest error against float64, relative to the largest output, over prompt and answer at a serving shape."""
    layout = StateLayout(layout_of(config).shape, 1)
    shape, weights = layout.shape, random_weights(layout.shape)
    z = torch.randn(131, shape.in_width, device="cuda").bfloat16()
    double = MixerWeights(
        conv=weights.conv.double(), gate_bias=weights.gate_bias.double(), norm=weights.norm.double(),
        anchor=weights.anchor.double(),
    )  # fmt: skip
    truth = mix(z[None].double(), double, shape, MixerState.initial(shape, double, 1))[0][0]
    errors = {}
    for name, wide, precision in (
        ("float32", True, None), ("bfloat16", False, None), ("bfloat16, tf32x3", False, "tf32x3"),
        ("bfloat16, tf32", False, "tf32"),
    ):  # fmt: skip
        x = z.float() if wide else z
        pool = pool_of(layout, weights, 2)
        out = x.new_full((len(z), shape.out_width), float("nan"))
        segments = DeviceSegments.of(Segments.of([(1, 0, 100)]), shape.C, "cuda")
        mix_prefill(x[:100], pool, 0, segments, weights, layout, out[:100], precision=precision)
        for t in range(100, len(z)):
            places = torch.tensor([1], device="cuda"), torch.tensor([t], device="cuda")
            mix_decode(x[t : t + 1], pool, 0, *places, weights, layout, out[t : t + 1])
        errors[name] = float((out.double() - truth).abs().max() / truth.abs().max())
    bounds = {name: 1e-5 if name == "float32" else 1e-2 for name in errors}
    if not all(errors[name] <= bounds[name] for name in errors):  # written so that NaN fails too
        sys.exit(f"correctness gate: errors against float64 are {errors}, bounds {bounds}")
    return errors


def torch_step(layout: StateLayout, batch: int) -> Callable[[], object]:
    """The recurrence of one token of each row in plain torch, C = 1: what an engine without kernels would run."""
    s = layout.shape
    A = torch.nn.functional.normalize(torch.randn(batch, s.H, s.d, s.m, device="cuda"), dim=2)
    q, k = (torch.nn.functional.normalize(torch.randn(batch, s.H, s.m, 1, device="cuda"), dim=2) for _ in range(2))
    v, gamma, mu = (torch.rand(batch, s.H, size, 1, device="cuda") for size in (s.d, 1, 1))

    def step() -> Tensor:
        h = v - A @ k
        w = A.mT @ h
        R = A * (mu - gamma * k * w).mT + h @ (gamma * k).mT
        A.copy_(R / R.norm(dim=2, keepdim=True))
        return A @ q

    return step


def fla_decode(shape: MixerShape, batch: int, layers: int) -> Callable[[], object]:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    q, k, v = (torch.randn(batch, 1, shape.H, n, device="cuda").bfloat16() for n in (shape.m, shape.m, shape.d))
    g, beta = -torch.rand(batch, 1, shape.H, device="cuda"), torch.rand(batch, 1, shape.H, device="cuda")
    states = [torch.randn(batch, shape.H, shape.m, shape.d, device="cuda") for _ in range(layers)]

    def step() -> None:
        for state in states:
            fused_recurrent_gated_delta_rule(
                q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
            )

    return step


def fla_prefill(shape: MixerShape, batch: int, tokens: int, chunk: int) -> Callable[[], object]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = (torch.randn(batch, tokens, shape.H, n, device="cuda").bfloat16() for n in (shape.m, shape.m, shape.d))
    g, beta = -torch.rand(batch, tokens, shape.H, device="cuda"), torch.rand(batch, tokens, shape.H, device="cuda")
    beta = beta.bfloat16()
    state = torch.randn(batch, shape.H, shape.m, shape.d, device="cuda")
    return lambda: chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True, chunk_size=chunk
    )


def measure_decode(config: LatticeConfig, ceilings: Device, batches: list[int], peer: bool) -> tuple[Table, Figures]:
    """One layer's mixer; microseconds."""
    layout = layout_of(config)
    s, weights = layout.shape, random_weights(layout.shape)
    table = Table("rows", "us", "floor", "share", "torch", "fla", title="mixer, decode, a layer")
    figures: Figures = {}
    for batch in batches:
        pool = pool_of(layout, weights, batch)
        z = torch.randn(batch, s.in_width, device="cuda").bfloat16()
        out = z.new_empty(batch, s.out_width)
        rows = torch.randperm(batch, device="cuda")
        times = []
        for slot in (0, s.C // 2, s.C - 1):  # a chunk's first token, one in the middle, and its last
            positions = torch.full_like(rows, slot)

            def step(positions: Tensor = positions, pool: Tensor = pool, z: Tensor = z, out: Tensor = out,
                     rows: Tensor = rows) -> None:  # fmt: skip
                for layer in range(layout.layers):
                    mix_decode(z, pool, layer, rows, positions, weights, layout, out, ahead=True)

            times.append(seconds(step) / layout.layers)
        mine = (times[0] + times[1] * (s.C - 2) + times[2]) / s.C
        floor = sum(mixer_decode_bytes(s, slot, 2) for slot in range(s.C)) / s.C * batch / ceilings.bytes_per_second
        plain = seconds(torch_step(layout, batch))
        other = seconds(fla_decode(s, batch, layout.layers)) / layout.layers if peer else float("nan")
        row = {"us": mine, "floor": floor, "torch": plain, "fla": other, "first": times[0], "last": times[2]}
        figures |= {f"decode, {batch} rows, {name}": round(value * 1e6, 2) for name, value in row.items()}
        table.add_row(
            str(batch), f"{mine * 1e6:.1f}", f"{floor * 1e6:.1f}", f"{floor / mine:.0%}",
            f"{plain * 1e6:.1f} ({plain / mine:.1f} x)", f"{other * 1e6:.1f} ({other / mine:.2f} x)",
        )  # fmt: skip
    return table, figures


def measure_prefill(config: LatticeConfig, cases: list[tuple[int, int]], peer: bool) -> tuple[Table, Figures]:
    """One layer's mixer over n prompts of T tokens; microseconds."""
    layout = StateLayout(layout_of(config).shape, 1)
    s, weights = layout.shape, random_weights(layout.shape)
    table = Table("prompts", "us", "fla, chunks of 16", "of 64", title="mixer, prefill, a layer")
    figures: Figures = {}
    for n, tokens in cases:
        pool = pool_of(layout, weights, n)
        z = torch.randn(n * tokens, s.in_width, device="cuda").bfloat16()
        out = z.new_empty(n * tokens, s.out_width)
        segments = DeviceSegments.of(Segments.of([(row, 0, tokens) for row in range(n)]), s.C, "cuda")
        mine = seconds(partial(mix_prefill, z, pool, 0, segments, weights, layout, out))
        others = [seconds(fla_prefill(s, n, tokens, chunk)) if peer else float("nan") for chunk in (s.C, 64)]
        names = ("us", "fla 16", "fla 64")
        figures |= {
            f"prefill, {n} x {tokens}, {name}": round(value * 1e6, 1)
            for name, value in zip(names, (mine, *others), strict=True)
        }
        cells = [f"{other * 1e6:.0f} ({other / mine:.2f} x)" for other in others]
        table.add_row(f"{n} x {tokens}", f"{mine * 1e6:.0f}", *cells)
    return table, figures


def random_network(config: LatticeConfig, pool: Tensor, layout: StateLayout, quantization: Any) -> TritonNetwork:
    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, device="cuda") / math.sqrt(columns)
        return values.bfloat16()

    s, width, inner = layout.shape, config.hidden_size, config.intermediate_size
    ones = torch.ones(width, device="cuda")
    layers = [
        LayerWeights(
            mixer_norm=ones, in_proj=matrix(s.in_width, width), mixer=random_weights(s),
            out_proj=matrix(width, s.out_width), mlp_norm=ones, gate_up_proj=matrix(2 * inner, width),
            down_proj=matrix(width, inner),
        )
        for _ in range(layout.layers)
    ]  # fmt: skip
    head = matrix(config.vocab_size, width)
    weights = DecoderWeights(embedding=head, layers=layers, norm=ones, head=head, norm_eps=config.norm_eps)
    return TritonNetwork(weights, layout, pool, quantization=quantization)


def prompt(network: TritonNetwork, ids: Tensor, segments: DeviceSegments) -> Tensor:
    """Logits [1, V] of the last of its tokens."""
    return network.logits(network.prefill(ids, segments)[-1:])


def measure_network(
    name: str, config: LatticeConfig, ceilings: Device, batches: list[int], prompts: list[int], quantization: Any = None
) -> tuple[Table, Figures]:
    """Steps of the whole network, in tokens a second."""
    layout = layout_of(config)
    pool = pool_of(layout, random_weights(layout.shape), max(batches))
    network = random_network(config, pool, layout, quantization)
    label = f"{name}{', ' + quantization if quantization else ''}"
    table = Table("step", "us", "tokens/s", "of the floor", title=label)
    figures: Figures = {}

    def add(what: str, taken: float, tokens: int, floor: float) -> None:
        figures[f"{label}, {what}, us"] = round(taken * 1e6, 1)
        table.add_row(what, f"{taken * 1e6:,.0f}", f"{tokens / taken:,.0f}", f"{floor / taken:.0%}")

    with torch.inference_mode():
        for batch in batches:
            ids, rows = torch.randint(config.vocab_size, (batch,), device="cuda"), torch.arange(batch, device="cuda")
            positions = torch.arange(batch, device="cuda") % layout.shape.C
            out = torch.empty(batch, config.vocab_size, device="cuda")
            taken = seconds(partial(network.decode, ids, rows, positions, out))
            floor = decode_step(config, batch, 1 if quantization else 2).seconds(ceilings)
            add(f"decode, batch {batch}", taken, batch, floor)
        for tokens in prompts:
            ids = torch.randint(config.vocab_size, (tokens,), device="cuda")
            segments = DeviceSegments.of(Segments.of([(0, 0, tokens)]), layout.shape.C, "cuda")
            for graph in (False, True):
                taken = seconds(partial(prompt, network, ids, segments), 10, graph=graph)
                what = f"prefill of {tokens}{', captured' if graph else ''}"
                add(what, taken, tokens, prefill(config, tokens).seconds(ceilings))
    return table, figures


def profile(config: LatticeConfig, batches: list[int], prompts: list[int]) -> None:
    """Where a step's time goes, kernel by kernel."""
    layout = layout_of(config)
    pool = pool_of(layout, random_weights(layout.shape), max(batches))
    network = random_network(config, pool, layout, None)
    with torch.inference_mode():
        calls: dict[str, Callable[[], object]] = {}
        for batch in batches:
            ids = torch.randint(config.vocab_size, (batch,), device="cuda")
            rows = torch.arange(batch, device="cuda")
            out = torch.empty(batch, config.vocab_size, device="cuda")
            calls[f"decode, batch {batch}"] = partial(network.decode, ids, rows, rows % layout.shape.C, out)
        for tokens in prompts:
            ids = torch.randint(config.vocab_size, (tokens,), device="cuda")
            segments = DeviceSegments.of(Segments.of([(0, 0, tokens)]), layout.shape.C, "cuda")
            calls[f"prefill of {tokens}"] = partial(prompt, network, ids, segments)
        for what, call in calls.items():
            call()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                call()
                torch.cuda.synchronize()
            events = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
            total = sum(event.device_time_total for event in events)
            print(f"{what}: {total:.0f} us in kernels")
            for event in events[:9]:
                print(f"    {event.device_time_total:8.1f} us {event.count:4d} x  {event.key[:60]}")


def measure_engine(config: LatticeConfig, batches: list[int], tokens: int) -> Figures:
    """Tokens a second through the engine, scheduler, sampler and all, greedy and drawn."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        init_model(config, model, seed=0, dtype=torch.bfloat16)
        (model / "tokenizer.model").write_bytes((bundled_model() / "tokenizer.model").read_bytes())
        began = time.perf_counter()
        llm = LLM(model, device="cuda", max_rows=max(batches), prefix_cache_memory=0)
        figures["engine, ready after s"] = round(time.perf_counter() - began, 1)
        for batch in batches:
            for label, temperature in (("greedy", 0.0), ("drawn", 1.0)):
                params = SamplingParams(max_tokens=tokens, temperature=temperature, ignore_eos=True, seed=1)
                prompts = [[place + 2, 7, 9] for place in range(batch)]
                llm.generate(prompts, params, progress=False)
                began = time.perf_counter()
                llm.generate(prompts, params, progress=False)
                rate = batch * tokens / (time.perf_counter() - began)
                figures[f"engine, batch {batch}, {label}, tokens/s"] = round(rate)
    return figures


def run_tests() -> None:
    """Every kernel against float64, on this device. Exits where one fails."""
    files = [str(path) for path in sorted((ROOT / "tests/kernels").rglob("test_triton*.py")) if "aot" not in path.name]
    files.append(str(ROOT / "tests/engine/test_triton_engine.py"))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *files], cwd=ROOT)
    if done.returncode:
        sys.exit("parity: a test failed on this device, nothing was measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ["tests", "parity", "mixer", "fla", "network", "profile", "engine"]
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections, help="(all)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="of the network (all)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256, 512], help="(%(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here that torch can use: `make test` runs the same parity by Triton's interpreter")
    console = Console(width=110)
    small, batches = MODELS["117M"], options.batches
    result: dict[str, Any] = {"benchmark": "gpu", "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if "tests" in options.sections:
        run_tests()
    ceilings = measured_ceilings()
    result["ceilings"] = {"GB/s": ceilings.bytes_per_second / 1e9, "TFLOP/s": ceilings.flops_per_second / 1e12}
    console.print(f"{result['device']}: {result['ceilings']}")
    if "parity" in options.sections:
        result["errors"] = {name: check_mixer(config) for name, config in MODELS.items()}
        console.print(f"errors against float64: {result['errors']}")
    peer = "fla" in options.sections and find_spec("fla") is not None
    if "mixer" in options.sections:
        for table, figures in (
            measure_decode(small, ceilings, batches, peer),
            measure_prefill(small, [(1, 512), (1, 8192), (16, 512), (64, 512)], peer),
        ):
            console.print(table)
            result["mixer"] = result.get("mixer", {}) | figures
    if "network" in options.sections:
        for name in options.models:
            for quantization in (None, "int8"):
                torch.cuda.empty_cache()
                table, figures = measure_network(
                    name, MODELS[name], ceilings, batches, [] if quantization else [512, 8192], quantization
                )
                console.print(table)
                result["network"] = result.get("network", {}) | figures
    if "profile" in options.sections:
        profile(small, [1, 64, 256], [512, 8192])
    if "engine" in options.sections:
        result["engine"] = measure_engine(
            small.model_copy(update={"vocab_size": 4096}), [batch for batch in batches if batch <= MAX_ROWS], 64
        )
        console.print(result["engine"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
