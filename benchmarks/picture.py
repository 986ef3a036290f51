"""Whole pictures in ComfyUI against its own Lens: the same weights, settings and process, bf16.

    COMFYUI_PATH=... python benchmarks/picture.py [--out FOLDER] [--folder SCRATCH]

Needs a CUDA GPU with 80 GB and 60 GB of RAM. Encoding, sampling and decoding are timed apart, all three
models on the GPU; nothing comes out of a cache. Weights are random; time does not depend on training. A
speed is written only if four steps end as close to plain PyTorch in fp32 as plain PyTorch in bf16 does.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, os.environ["COMFYUI_PATH"])
sys.path.insert(0, str(Path(__file__).parents[1]))
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd

from benchmarks.common import RESULTS, median_ms, write
from benchmarks.denoiser import TOLERANCE, load, plain_torch
from benchmarks.encoder import _nvfp4
from benchmarks.models import write_models
from lens_core.denoiser import DenoiserRun
from lens_core.kernels.backend import apart
from lens_core.ops import sdpa
from lens_core.sampling import euler, sigmas

PACK = Path(__file__).parents[1]
DEVICE = torch.device("cuda")
SIZES = {"512x512": (32, 32), "1024x1024": (64, 64), "1440x1440": (90, 90), "1472x736": (46, 92)}
SETTINGS = {"Lens, 20 steps, cfg 5": (20, 5.0), "Turbo, 4 steps, cfg 1": (4, 1.0)}
PROMPT = " ".join(f"word{index}" for index in range(24))


def pack() -> SimpleNamespace:
    """The pack's host modules, imported as ComfyUI imports it."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])  # before ours: both have a package named nodes
    spec = importlib.util.spec_from_file_location(
        "lens_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None
    sys.modules["lens_pack"] = importlib.util.module_from_spec(spec)
    names = ("model", "clip", "vae", "sampling", "paths", "denoiser")
    found = {name: importlib.import_module(f"lens_pack.nodes.host.{name}") for name in names}
    found["paths"].register_folders()
    graphs = importlib.import_module("lens_pack.lens_core.denoiser").BlockGraphs
    return SimpleNamespace(**found, graphs=graphs)


class Models:
    """Encoder, denoiser and VAE of one implementation behind the same three calls."""

    def __init__(self, encode: Callable[[], list], denoiser: Any, vae: Any, sigmas_for: Callable) -> None:
        self.encode, self.denoiser, self.vae, self.sigmas_for = encode, denoiser, vae, sigmas_for

    def sample(self, grid: tuple[int, int], steps: int, cfg: float, positive: list, negative: list) -> Tensor:
        latent = {"samples": torch.zeros(1, 128, *grid)}
        guider = comfy.samplers.CFGGuider(self.denoiser)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        noise = comfy.sample.prepare_noise(latent["samples"], 1)
        euler_sampler = comfy.samplers.sampler_object("euler")
        levels = self.sigmas_for(latent, steps, 1.0)
        return guider.sample(noise, latent["samples"], euler_sampler, levels, disable_pbar=True, seed=1)

    def times(self, grid: tuple[int, int], steps: int, cfg: float) -> dict[str, float]:
        """Median ms of each part, and their sum."""
        positive = self.encode()
        negative = [[positive[0][0][:, :0], {}]]
        latents = self.sample(grid, steps, cfg, positive, negative)
        rounds = 5 if steps < 10 else 3
        parts = {
            "encode": median_ms(self.encode, 5, 1),
            "sample": median_ms(lambda: self.sample(grid, steps, cfg, positive, negative), rounds, 1),
            "decode": median_ms(lambda: self.vae.decode(latents), 5, 1),
        }
        return {**parts, "picture": sum(parts.values())}


def ours(folder: Path, host: SimpleNamespace, graphs: bool) -> Models:
    """Through the pack's own loaders."""
    clip = host.clip.load_clip(folder / "gpt_oss_20b_mxfp4.safetensors", remember=False)
    denoiser, _ = host.model.load_model(folder / "lens_bf16.safetensors", None)
    if graphs:
        denoiser = denoiser.clone(disable_dynamic=True)
        denoiser.model_options["transformer_options"][host.denoiser.GRAPHS] = host.graphs()
    vae = host.vae.load_host_vae(folder / "flux2-vae.safetensors")

    def encode() -> list:
        return clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))

    return Models(encode, denoiser, vae, host.sampling.sigmas_for)


def comfyui(folder: Path, host: SimpleNamespace, ids: list[int]) -> Models:
    """ComfyUI's own encoder (nvfp4), denoiser and VAE."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [_nvfp4(generator)],
        clip_type=comfy.sd.CLIPType.LENS,
        model_options={"dtype": torch.bfloat16, "load_device": DEVICE, "initial_device": DEVICE},
    )
    denoiser = comfy.sd.load_diffusion_model(str(folder / "lens_bf16.safetensors"))
    vae = comfy.sd.VAE(load_file(folder / "flux2-vae.safetensors"))

    def encode() -> list:
        tokens = {"gpt_oss": [[(token, 1.0) for token in ids]]}
        out = clip.encode_from_tokens(tokens, return_dict=True)
        return [[out.pop("cond"), out]]

    return Models(encode, denoiser, vae, host.sampling.sigmas_for)


def check(folder: Path, grid: tuple[int, int] = (64, 64)) -> dict[str, float]:
    """Relative L2 from fp32 after four steps: the fast path's, which must not exceed plain PyTorch's."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    model = load(torch.Generator(DEVICE).manual_seed(0))
    exact = copy.deepcopy(model).float()
    noise = torch.randn(1, grid[0] * grid[1], 128, generator=generator, device=DEVICE)
    text = torch.randn(1, 200, 4, 2880, generator=generator, device=DEVICE)
    levels = sigmas(4, grid[0] * grid[1]).to(torch.bfloat16).float()

    def draw(network: Any, dtype: torch.dtype, **options: Any) -> Tensor:
        run = DenoiserRun(levels[:-1].tolist())

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            out = network(x.to(dtype), sigma.expand(1), text.to(dtype), grid, run=run, **options)
            return out.float()

        return euler(velocity, noise, levels.to(DEVICE))

    with plain_torch():
        want = draw(exact, torch.float32, attention=sdpa)
        plain = apart(draw(model, torch.bfloat16, attention=sdpa), want)
    error = apart(draw(model, torch.bfloat16), want)
    if not error <= TOLERANCE * plain:
        raise SystemExit(f"Ours is off by {error:.2e}, plain PyTorch in bf16 by {plain:.2e}: no speed.")
    return {"ours": error, "plain PyTorch": plain}


@torch.inference_mode()
def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for picture.json and picture.md")
    parser.add_argument("--folder", type=Path, default=None, help="where 22 GB can lie for a while")
    args = parser.parse_args()
    host = pack()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        write_models(folder, folder, folder)
        results["error after four steps"] = check(folder)
        torch.cuda.empty_cache()
        clip = host.clip.load_clip(folder / "gpt_oss_20b_mxfp4.safetensors", remember=False)
        ids = [token for token, *_ in next(iter(clip.tokenize(PROMPT).values()))[0]]
        for name, make in (
            ("ours", lambda: ours(folder, host, graphs=False)),
            ("ours, CUDA graphs", lambda: ours(folder, host, graphs=True)),
            ("ComfyUI", lambda: comfyui(folder, host, ids)),
        ):
            models = make()
            results[name] = {
                f"{size}, {setting}": models.times(grid, *values)
                for setting, values in SETTINGS.items()
                for size, grid in SIZES.items()
            }
            print(name, json.dumps(results[name], indent=1), flush=True)
            del models
            comfy.model_management.unload_all_models()
            torch.cuda.empty_cache()
    rows = [["ms: sampling / whole picture", "ComfyUI", "ours", "ours, CUDA graphs"]]
    for case in results["ours"]:
        cells = [results[name][case] for name in ("ComfyUI", "ours", "ours, CUDA graphs")]
        rows.append([case, *(f"{cell['sample']:.0f} / {cell['picture']:.0f}" for cell in cells)])
    write("picture", args.out, results, rows)


if __name__ == "__main__":
    main()
