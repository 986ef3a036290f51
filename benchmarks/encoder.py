"""The text encoder against ComfyUI's own (nvfp4) and transformers' (bf16), full size, random weights.

    COMFYUI_PATH=... python benchmarks/encoder.py [--out FOLDER] [--folder SCRATCH]

Needs a CUDA GPU with 60 GB and 40 GB of RAM. Weights are random: time and memory do not depend on their
values. All three read the same prompts: n tokens after the template's prefix of 97. Ours knows the prefix
after its first prompt; the others run it each time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, median_ms, peak_gb, write
from lens_core import kernels
from lens_core.config import CAPTURED_LAYERS, EncoderConfig
from lens_core.encoder import GptOssEncoder
from lens_core.kernels.registry import EAGER
from lens_core.loading import open_encoder
from lens_core.text_encoder import TextEncoder
from lens_core.tiny.tokenizer import tiny_tokenizer

CONFIG = EncoderConfig()
DEVICE = torch.device("cuda")
PREFIX = 97
TOKENS = (12, 42, 99, 172, 269, 415)
# e8m0 bytes that make random codes (mean square 8.56) matrices of about 1 / sqrt(2880), and an eighth.
_SCALES, _SMALL_SCALES = (119, 121), (116, 118)


def random_mxfp4(config: EncoderConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """An encoder's tensors under Hugging Face's names, on the CPU.

    Initialised as GPT-2 was: what writes into the residual stream is smaller by the root of the number of
    layers' updates, so that the stream grows slowly, as in a trained model. (Were every update as large as
    the stream, each layer would amplify the rounding of the one before, in any implementation.)
    """
    updates = math.sqrt(2 * config.num_hidden_layers)
    tensors = {}
    for name, like in GptOssEncoder(config, device="meta").state_dict().items():
        writes = "o_proj" in name or "down_proj" in name
        if like.dtype == torch.uint8:
            low, high = _SMALL_SCALES if writes else _SCALES
            low, high = (0, 256) if name.endswith("_blocks") else (low, high)
            random = {"generator": generator, "device": DEVICE, "dtype": torch.uint8}
            tensor = torch.randint(low, high, like.shape, **random)
        else:
            noise = torch.randn(like.shape, generator=generator, device=DEVICE)
            if "embed_tokens" not in name:
                small = like.ndim == 1 or name.endswith("bias")
                noise *= (0.1 if small else 1 / math.sqrt(like.shape[-1])) / (updates if writes else 1)
            tensor = (noise + name.endswith("layernorm.weight")).bfloat16()
        tensors[f"model.{name}"] = tensor.cpu()
    text = tiny_tokenizer().to_str().encode()
    return {**tensors, "tokenizer_json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def ids_of(count: int) -> list[int]:
    """Token ids of a chat: a prefix with its three messages, then ``count`` others."""
    message = tiny_tokenizer().token_to_id("<|message|>")
    head = [(7 * i) % 200 for i in range(PREFIX)]
    head[2] = head[40] = head[-1] = message
    return head + [(11 * i + count) % 200 for i in range(count)]


class Kept:
    """An encoder file whose chats split after 97 tokens, as with GPT-OSS's own tokenizer."""

    def __init__(self, path: Path) -> None:
        self.file = open_encoder(path)
        self.config, self.identity, self.load = self.file.config, self.file.identity, self.file.load
        self.tokenizer = self

    @staticmethod
    def split(ids: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(ids[:PREFIX]), tuple(ids[PREFIX:])


def ours(path: Path) -> dict[str, Any]:
    """Every way that ours runs."""
    result: dict[str, Any] = {}
    start = torch.cuda.memory_allocated()
    text = TextEncoder(Kept(path), torch.bfloat16)  # type: ignore[arg-type]

    def encode(*counts: int) -> None:
        text.encode([ids_of(count) for count in counts], DEVICE)

    began = time.perf_counter()
    text.read()
    result["open and map s"] = time.perf_counter() - began
    encode(172)
    result["bandwidth GB/s"] = bandwidth()
    result["streamed GB"] = text.total / 1e9
    result["stream ms"] = median_ms(lambda: encode(172), 7)
    result["stream peak GB"] = peak_gb(lambda: encode(172))
    result["stream floor ms"] = 1e3 * text.total / 1e9 / result["bandwidth GB/s"]
    began = time.perf_counter()
    text.load(DEVICE, math.inf)
    torch.cuda.synchronize()
    result["load to GPU s"] = time.perf_counter() - began
    result["resident GB"] = (torch.cuda.memory_allocated() - start) / 1e9
    result["ms"] = {count: median_ms(lambda n=count: encode(n)) for count in TOKENS}
    result["peak GB at 415"] = peak_gb(lambda: encode(415))
    result["four prompts of 172 ms"] = median_ms(lambda: encode(172, 172, 172, 172))
    result["prefix not known ms"] = median_ms(lambda: (text.prefix.put((), torch.zeros(0)), encode(172)))
    with plain_torch():
        result["without Triton ms"] = {
            count: median_ms(lambda n=count: encode(n), 5) for count in (12, 172, 415)
        }
        result["without Triton peak GB"] = peak_gb(lambda: encode(172))
    text.unload()
    torch.cuda.empty_cache()
    result["left after eviction MB"] = (torch.cuda.memory_allocated() - start) / 1e6
    return result


def ours_dense(path: Path) -> dict[str, Any]:
    """With the experts dequantised."""
    start = torch.cuda.memory_allocated()
    text = TextEncoder(Kept(path), torch.bfloat16, dense=True)  # type: ignore[arg-type]
    text.load(DEVICE, math.inf)
    resident = (torch.cuda.memory_allocated() - start) / 1e9
    times = {count: median_ms(lambda n=count: text.encode([ids_of(n)], DEVICE), 7) for count in TOKENS}
    return {"resident GB": resident, "ms": times}


@contextmanager
def plain_torch() -> Iterator[None]:
    """As on a machine without Triton."""
    chosen = kernels.choose
    kernels.choose = lambda *_: EAGER
    try:
        yield
    finally:
        kernels.choose = chosen


def bandwidth() -> float:
    """Host to device from page-locked memory, GB/s."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    ms = median_ms(lambda: device.copy_(host, non_blocking=True))
    return (1 << 30) / 1e6 / ms


def comfyui(generator: torch.Generator) -> dict[str, Any]:
    """ComfyUI's own Lens encoder with random nvfp4 experts, on the GPU."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.model_management
    import comfy.sd

    clip = comfy.sd.load_text_encoder_state_dicts(
        [_nvfp4(generator)],
        clip_type=comfy.sd.CLIPType.LENS,
        model_options={"dtype": torch.bfloat16, "load_device": DEVICE, "initial_device": DEVICE},
    )
    start = torch.cuda.memory_allocated()
    model = clip.cond_stage_model

    def encode(count: int) -> None:
        tokens = {"gpt_oss": [[(token, 1.0) for token in ids_of(count)]]}
        clip.encode_from_tokens(tokens)

    with torch.inference_mode():
        times = {count: median_ms(lambda n=count: encode(n), 5, 2) for count in TOKENS}
    resident = sum(p.nbytes for p in model.state_dict().values()) / 1e9
    comfy.model_management.unload_all_models()
    return {"resident GB": resident, "allocated before GB": start / 1e9, "ms": times}


def _nvfp4(generator: torch.Generator) -> dict[str, Tensor]:
    """ComfyUI's names and layout: codes, e4m3 scales in tiles of 128 x 4, an fp32 factor, a description."""
    state = {}
    for name, tensor in random_mxfp4(CONFIG, generator).items():
        if not name.endswith(("_blocks", "_scales", "_proj_bias")) or ".self_attn." in name:
            state[name.removeprefix("model.")] = tensor
    shapes = {"gate_up_proj": (2 * CONFIG.intermediate_size, CONFIG.hidden_size)}
    shapes["down_proj"] = (CONFIG.hidden_size, CONFIG.intermediate_size)
    description = torch.tensor(
        list(json.dumps({"format": "nvfp4", "num_experts": 32}).encode()), dtype=torch.uint8
    )
    for layer in range(CONFIG.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            key = f"layers.{layer}.mlp.experts.{name}"
            codes = torch.randint(0, 256, (32, rows, columns // 2), generator=generator, device=DEVICE)
            padded = (32, -(-rows // 128) * 128, -(-columns // 16 // 4) * 4)
            scales = torch.randint(40, 64, padded, generator=generator, device=DEVICE)
            state[f"{key}.weight"] = codes.to(torch.uint8).cpu()
            state[f"{key}.weight_scale"] = scales.to(torch.uint8).view(torch.float8_e4m3fn).cpu()
            state[f"{key}.weight_scale_2"] = torch.full((32,), 0.02)
            state[f"{key}.bias"] = torch.zeros(32, rows, dtype=torch.bfloat16)
            state[f"{key}.comfy_quant"] = description
    return state


def transformers_bf16() -> dict[str, Any]:
    """transformers' GptOssModel dequantised to bf16, hidden states of the four layers kept."""
    from transformers import GptOssConfig, GptOssModel

    start = torch.cuda.memory_allocated()
    # Its defaults are the 120B model's.
    config = GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    with torch.device("meta"):
        model = GptOssModel(config).bfloat16()
    model = model.to_empty(device=DEVICE).eval()
    for name, parameter in model.named_parameters():
        scale = 0.1 if parameter.ndim == 1 or "bias" in name else 1 / math.sqrt(2880)
        parameter.data.normal_(0, scale)
    model.rotary_emb = type(model.rotary_emb)(config).to(DEVICE)
    kept: list[Tensor] = []
    for index in CAPTURED_LAYERS:
        model.layers[index].register_forward_hook(lambda _, __, out: kept.append(out))

    def encode(count: int) -> None:
        kept.clear()
        model(input_ids=torch.tensor([ids_of(count)], device=DEVICE), use_cache=False)

    resident = (torch.cuda.memory_allocated() - start) / 1e9
    with torch.inference_mode():
        times = {count: median_ms(lambda n=count: encode(n), 5, 2) for count in TOKENS}
    return {"resident GB": resident, "ms": times}


def _measured(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    print(f"{name} ...", flush=True)
    result = run()
    print(json.dumps(result, indent=1), flush=True)
    return result


def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for encoder.json and encoder.md")
    parser.add_argument("--folder", type=Path, default=None, help="where 12.6 GB can lie for a while")
    args = parser.parse_args()
    generator = torch.Generator(DEVICE).manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "gpt_oss_random.safetensors"
        save_file(random_mxfp4(CONFIG, generator), path)
        results = {
            "ours": _measured("ours", lambda: ours(path)),
            "ours, dequantised": _measured("ours, dequantised", lambda: ours_dense(path)),
        }
    results["transformers, bf16"] = _measured("transformers", transformers_bf16)
    results["ComfyUI, nvfp4"] = _measured("ComfyUI", lambda: comfyui(generator))
    mine = results["ours"]
    rows = [["tokens after the prefix", *TOKENS, "resident GB"]]
    for name, result in results.items():
        times = [f"{result['ms'][count]:.1f} ms" for count in TOKENS]
        rows.append([name, *times, f"{result['resident GB']:.2f}"])
    slow = mine["without Triton ms"]
    cells = [f"{slow[count]:.1f} ms" if count in slow else "" for count in TOKENS]
    rows.append(["ours without Triton", *cells, f"{mine['resident GB']:.2f}"])
    streamed = [f"{mine['stream ms']:.0f} ms" if count == 172 else "" for count in TOKENS]
    rows.append(["ours, streamed", *streamed, f"{mine['stream peak GB']:.2f} (while encoding)"])
    write("encoder", args.out, results, rows)


if __name__ == "__main__":
    main()
