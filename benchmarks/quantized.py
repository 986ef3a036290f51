"""One forward of the denoiser in every mode of the selector against bf16, ComfyUI's own and torchao's.

    COMFYUI_PATH=... python benchmarks/quantized.py [--out FOLDER]

Needs a CUDA GPU with 60 GB. The same random full-size weights and inputs for all. torchao is measured where
it is installed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, median_ms, peak_gb, write
from benchmarks.denoiser import DEVICE, TEXT, Case, comfyui, load
from benchmarks.fidelity import per_token
from lens_core.config import is_modulation
from lens_core.denoiser import BlockGraphs, DenoiserRun, LensDenoiser
from lens_core.quant import kitchen
from lens_core.quant.policy import MODES, is_quantized
from lens_core.quantized import quantize_denoiser

GRIDS = {"512x512": (32, 32), "1024x1024": (64, 64), "1440x1440": (90, 90)}
CASES = [(size, text) for size in GRIDS for text in (TEXT, 0)]
# All cases are timed this often, one after the other: a lent machine's CPU may lag for seconds.
PASSES = 3
# ComfyUI's formats of 8 bits, with inputs quantised.
PEERS = {"float8_e4m3fn": "TensorCoreFP8E4M3Layout", "int8_tensorwise": "TensorWiseINT8Layout"}


def native(form: LensDenoiser, name: str) -> bool:
    """Whether this GPU multiplies a mode's format."""
    needs = kitchen.NEEDS.get(name)
    return needs is None or torch.cuda.get_device_capability() >= needs


def of_mode(model: LensDenoiser, mode: str) -> LensDenoiser:
    """A copy in a mode."""
    result = copy.deepcopy(model)
    quantize_denoiser(result, mode)
    gc.collect()
    torch.cuda.empty_cache()
    return result


def of_comfyui(model: LensDenoiser, name: str) -> nn.Module:
    """ComfyUI's own Lens with the same linears in one of its formats, as its mixed precision loads them."""
    import comfy.ldm.lens.model
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor

    own = comfyui(model)
    operations = comfy.ops.mixed_precision_ops(compute_dtype=torch.bfloat16)
    weights: dict[str, Tensor] = {}
    entry = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    for key, value in own.state_dict().items():
        layer = key.removesuffix(".weight")
        if layer == key or not is_quantized(layer):
            weights[key] = value
            continue
        options = {"per_channel": True} if name == "int8_tensorwise" else {"scale": "recalculate"}
        packed = QuantizedTensor.from_float(value, PEERS[name], **options)
        weights |= {**packed.state_dict(key), f"{layer}.comfy_quant": entry}
    with torch.device("meta"):
        result = comfy.ldm.lens.model.LensTransformer2DModel(
            operations=operations, device=DEVICE, dtype=torch.bfloat16
        )
    result.load_state_dict(weights, assign=True)
    return result.requires_grad_(False)


def of_torchao(model: LensDenoiser, name: str) -> LensDenoiser:
    """A copy with the same linears quantised by torchao."""
    from torchao import quantization

    configs = {
        "float8_weight_only": quantization.Float8WeightOnlyConfig,
        "int8_weight_only": quantization.Int8WeightOnlyConfig,
    }
    result = copy.deepcopy(model)
    quantization.quantize_(result, configs[name](), filter_fn=lambda layer, name: is_quantized(name))
    return result


def released_gb(model: nn.Module) -> float:
    """GB of what a step needs: all tensors but the modulation's weights."""

    def size(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.nbytes

    parameters = model.named_parameters()
    kept = (tensor for name, tensor in parameters if not is_modulation(name.rpartition(".")[0]))
    return sum(size(tensor) for tensor in kept) / 1e9


def forward(
    model: nn.Module, case: Case, run: DenoiserRun, graphs: BlockGraphs | None
) -> Callable[[], Tensor]:
    """One forward of ours, its text projected once."""
    text = model.embed_text(case.text)
    return lambda: case.ours(model, run, text, graphs=graphs)


def measure(model: nn.Module, cases: dict[str, Case], want: dict[str, Tensor]) -> dict[str, Any]:
    """Times of all cases, memory, and how far the velocity is from bf16's."""
    result: dict[str, Any] = {"resident, modulation released GB": released_gb(model)}
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name, case in cases.items():
        calls[name] = {"ms": lambda case=case: case.theirs(model)}
        if isinstance(model, LensDenoiser):
            calls[name]["ms"] = forward(model, case, DenoiserRun([0.5]), None)
            if name.startswith("512"):
                calls[name]["ms, CUDA graph"] = forward(model, case, DenoiserRun([0.5]), BlockGraphs())
        result[name] = per_token(calls[name]["ms"](), want[name])
        result[name]["peak GB"] = peak_gb(calls[name]["ms"])
    passes = [
        {name: {kind: median_ms(call, 8) for kind, call in kinds.items()} for name, kinds in calls.items()}
        for _ in range(PASSES)
    ]
    for name, kinds in calls.items():
        for kind in kinds:
            result[name][kind] = statistics.median(times[name][kind] for times in passes)
            result[name][f"{kind}, each pass"] = [times[name][kind] for times in passes]
    return result


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row each, times with their share of bf16's."""
    names = [f"{size}, {text} text tokens" for size, text in CASES]
    rows = [["one forward, ms", *names, "512x512, CUDA graph", "GB in a step", "cosine with bf16"]]
    for who, result in results.items():
        if names[0] not in result:
            continue
        times = [result[name]["ms"] for name in names]
        whole = [results["bf16"][name]["ms"] for name in names]
        cells = [f"{ms:.1f} ({ms / bf16:.2f})" for ms, bf16 in zip(times, whole, strict=True)]
        graph, cosine = result[names[0]].get("ms, CUDA graph"), result[names[2]].get("cosine")
        rows.append(
            [
                who,
                *cells,
                "" if graph is None else f"{graph:.1f}",
                f"{result['resident, modulation released GB']:.2f}",
                "" if cosine is None else f"{cosine:.5f}",
            ]
        )
    return rows


@torch.inference_mode()
def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for quantized.json and .md")
    parser.add_argument("--modes", nargs="*", default=list(MODES), help="of the selector; all by default")
    parser.add_argument("--peers", type=int, default=1, help="0: without the others")
    args = parser.parse_args()
    generator = torch.Generator(DEVICE).manual_seed(0)
    model = load(generator)
    cases = {f"{size}, {text} text tokens": Case(GRIDS[size], text, generator) for size, text in CASES}
    want = {name: forward(model, case, DenoiserRun([0.5]), None)() for name, case in cases.items()}
    makers: dict[str, Callable[[], nn.Module]] = {"bf16": lambda: model}
    for mode in args.modes:
        makers[mode] = lambda mode=mode: of_mode(model, mode)
    if args.peers:
        comfyui(model)  # finds ComfyUI
        makers |= {f"ComfyUI, {name}": lambda name=name: of_comfyui(model, name) for name in PEERS}
        makers |= {"ComfyUI, bf16": lambda: comfyui(model)}
        for name in ("float8_weight_only", "int8_weight_only"):
            makers[f"torchao, {name}"] = lambda name=name: of_torchao(model, name)
    results: dict[str, Any] = {}
    for who, make in makers.items():
        results[who] = measure(make(), cases, want)
        print(who, json.dumps(results[who]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    write("quantized", args.out, results, table(results))


if __name__ == "__main__":
    main()
