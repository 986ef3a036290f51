"""The reasoner's speed: tokens that GPT-OSS-20B's own weights write, full size, random weights.

    python benchmarks/reasoner.py [--out FOLDER] [--folder SCRATCH] [--tokens 300] [--tiny]

Needs a CUDA GPU with 20 GB and 40 GB of RAM, and PyTorch's own allocator for CUDA graphs. --tiny runs a tiny
model on the CPU, to try this file. transformers' generate is beside it, its experts dequantised to bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, median_ms, write
from lens_core.config import EncoderConfig
from lens_core.loading import open_encoder
from lens_core.reasoner import generate
from lens_core.reasoner.generate import Decoder, tokens
from lens_core.reasoner.head import loaded_head
from lens_core.reasoner.sampling import Sampler, Sampling
from lens_core.text_encoder import TextEncoder
from lens_core.tiny.models import encoder_config, encoder_weights, packed_encoder
from lens_core.tiny.tokenizer import tiny_tokenizer

PROMPT = 600


def write_file(path: Path, tiny: bool) -> None:
    """An encoder with norm and lm_head."""
    if tiny:
        text = torch.tensor(list(tiny_tokenizer().to_str().encode()), dtype=torch.uint8)
        config = encoder_config(tiny_tokenizer().get_vocab_size())
        weights = packed_encoder(encoder_weights(config, torch.Generator().manual_seed(0)))
        save_file({**weights, "tokenizer_json": text}, path)
        return
    from benchmarks.encoder import CONFIG, DEVICE, random_mxfp4

    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = random_mxfp4(CONFIG, generator)
    shape = (CONFIG.vocab_size, CONFIG.hidden_size)
    head = torch.randn(shape, generator=generator, device=DEVICE) / math.sqrt(CONFIG.hidden_size)
    weights["lm_head.weight"] = head.bfloat16().cpu()
    weights["model.norm.weight"] = torch.ones(CONFIG.hidden_size, dtype=torch.bfloat16)
    save_file(weights, path)


def ids() -> list[int]:
    """A request's tokens."""
    return [(11 * index) % 200 for index in range(PROMPT)]


def measure(path: Path, device: torch.device, count: int) -> dict[str, Any]:
    """Prefill, and tokens a second with and without CUDA graphs."""
    text = TextEncoder(open_encoder(path), torch.bfloat16)
    text.load(device, math.inf)
    resident = _allocated(device)
    results: dict[str, Any] = {"prompt tokens": PROMPT, "tokens": count, "encoder GB": resident / 1e9}
    start = time.perf_counter()
    with loaded_head(text, device) as head:
        results["head loaded s"] = time.perf_counter() - start
        results["head GB"] = (_allocated(device) - resident) / 1e9
        clock: Callable[..., float] = median_ms if device.type == "cuda" else _wall_ms
        results["prefill ms"] = clock(lambda: Decoder(text, head, device).prefill(ids()))
        results["tokens/s"] = _rate(text, head, device, count)
        recordable, generate.why_never = generate.why_never, lambda _: "not recorded here"
        results["tokens/s, launched"] = _rate(text, head, device, count)
        generate.why_never = recordable
        if device.type == "cuda":
            results["peak GB beside the encoder"] = (torch.cuda.max_memory_allocated() - resident) / 1e9
    results["left GB"] = (_allocated(device) - resident) / 1e9
    return results


def _rate(text: TextEncoder, head: Any, device: torch.device, count: int) -> float:
    """Tokens a second after the first ones, which compile and record."""
    sampler = Sampler(Sampling(seed=1), device, text.file.config.vocab_size)
    warm, times = 8, []
    for _ in tokens(Decoder(text, head, device), ids(), sampler, count + warm):
        times.append(time.perf_counter())
    return count / (times[-1] - times[warm - 1])


def peer(config: EncoderConfig, device: torch.device, count: int) -> dict[str, Any]:
    """transformers' generate, greedy: the time of many tokens less that of few."""
    from transformers import GptOssConfig, GptOssForCausalLM

    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(num_hidden_layers=24, num_local_experts=32)).bfloat16()
    model = model.to_empty(device=device).eval()
    for name, parameter in model.named_parameters():
        scale = 0.1 if parameter.ndim == 1 or "bias" in name else 1 / math.sqrt(config.hidden_size)
        parameter.data.normal_(0, scale)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    prompt = torch.tensor([ids()], device=device)

    def seconds(new: int) -> float:
        return median_ms(lambda: _generate(model, prompt, new), 3, 1) / 1e3

    few = seconds(8)
    return {"prefill and 8 tokens ms": 1e3 * few, "tokens/s": count / (seconds(8 + count) - few)}


def _generate(model: Any, prompt: torch.Tensor, new: int) -> None:
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _wall_ms(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Measure, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for reasoner.json and reasoner.md")
    parser.add_argument("--folder", type=Path, default=None, help="where 13.8 GB can lie for a while")
    parser.add_argument("--tokens", type=int, default=300, help="written in each measurement")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny else "cuda")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, torch.inference_mode():
        path = Path(folder) / "gpt_oss_random.safetensors"
        write_file(path, args.tiny)
        results: dict[str, Any] = {"ours": measure(path, device, args.tokens)}
    print(json.dumps(results, indent=1), flush=True)
    if not args.tiny:
        torch.cuda.empty_cache()
        results["transformers, bf16"] = peer(EncoderConfig(), device, args.tokens)
    names = sorted({name for result in results.values() for name in result})
    rows = [["", *results]]
    rows += [
        [name, *(f"{result[name]:.4g}" if name in result else "" for result in results.values())]
        for name in names
    ]
    write("reasoner", args.out, results, rows)


if __name__ == "__main__":
    main()
