"""What the quality harness compares: the denoiser in bf16, its texts, its decoder, and the modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.denoiser import TEXT, load
from lens_core.config import PIXELS_PER_TOKEN, DenoiserConfig
from lens_core.denoiser import LensDenoiser
from lens_core.loading import SUBFOLDERS, load_denoiser, load_vae, open_encoder
from lens_core.sampling import tokens_to_grid
from lens_core.text_encoder import TextEncoder
from lens_core.tiny import models as tiny

# Makes the denoiser given to it a quantised one, in place.
Mode = Callable[[LensDenoiser], None]
# Latents [1, N, C] of a grid -> a picture [H, W, 3] in 0..1.
Decode = Callable[[Tensor, tuple[int, int]], Tensor]
BAD = "all_linear_int4"
PROMPTS = (
    "a lighthouse on a cliff at dusk, long exposure",
    "portrait of an old fisherman, soft window light",
    "a clear blue sky over a wheat field",
    "a shop sign that reads 'open all night', neon, rain",
)
RANDOM, TRAINED = "random", "trained"
_PROJECTION = "a fixed random matrix: each token's vector to its 16 x 16 pixels"


@dataclass
class Subject:
    """The model in bf16 that all modes are made of; ``texts`` are features [1, S, L, text hidden], one or
    more, taken in turn. ``weights``, ``text`` and ``decoder`` say what these are."""

    model: LensDenoiser
    texts: Sequence[Tensor]
    decode: Decode
    device: torch.device
    weights: str = RANDOM
    text: str = RANDOM
    decoder: str = _PROJECTION


def modes(names: Sequence[str] | None, device: torch.device) -> dict[str, Mode]:
    """The selector's modes of these names, all by default, and the bad example."""
    if names is not None and set(names) == {BAD}:
        return {BAD: all_linear_int4}
    from lens_core.quant.policy import MODES
    from lens_core.quantized import quantize_denoiser

    found: dict[str, Mode] = {name: partial(quantize_denoiser, mode=name, device=device) for name in MODES}
    found[BAD] = all_linear_int4
    unknown = set(names or ()) - set(found)
    if unknown:
        raise SystemExit(f"no mode {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return found if names is None else {name: found[name] for name in names}


def all_linear_int4(model: LensDenoiser) -> None:
    """The bad example: every linear, modulation and ends too, in int4 with one scale for an output's row."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            wide = layer.weight.float()
            scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
            layer.weight.copy_((wide / scale).round() * scale)


def full_size(device: torch.device) -> Subject:
    """The published size with random weights."""
    model = load(torch.Generator(device).manual_seed(0))
    return Subject(model, _random_texts(model.config, TEXT, device), projection(device), device)


def tiny_size(device: torch.device) -> Subject:
    """The tests' tiny model."""
    model = LensDenoiser(tiny.DENOISER, dtype=torch.bfloat16)
    model.load_state_dict(tiny.denoiser_weights(torch.Generator().manual_seed(0)))
    model = model.to(device).eval().requires_grad_(False)
    return Subject(model, _random_texts(model.config, 8, device), projection(device), device)


def from_files(path: Path, vae: Path | None, device: torch.device) -> Subject:
    """Trained weights of a Lens folder or a denoiser's file; of an encoder and a VAE that are not there,
    random features and the projection take the place."""
    model = load_denoiser(path, torch.bfloat16).to(device).requires_grad_(False)
    subject = Subject(model, (), projection(device), device, weights=TRAINED)
    if (path / SUBFOLDERS["encoder"]).is_dir():
        subject.texts, subject.text = _encoded(path, device), "; ".join(PROMPTS)
    else:
        subject.texts = _random_texts(model.config, TEXT, device)
    if vae is not None or (path / SUBFOLDERS["vae"]).is_dir():
        subject.decode, subject.decoder = _vae(vae or path, device), "FLUX.2's VAE, fp32"
    return subject


def projection(device: torch.device) -> Decode:
    """Each token's vector times one random matrix is its tile of pixels, around grey.

    Random weights' stand-in for the VAE. A VAE with random weights does draw something, but a grid of its own
    too, even of white noise (at 512 x 512 ``grid_energy`` says 1.2, of the tiny VAE 1.7: repeated pixels,
    convolved at random), in which the denoiser's drowns; this draws none.
    """
    side, channels = PIXELS_PER_TOKEN, DenoiserConfig().in_channels
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(channels, side * side * 3, generator=generator).to(device) / channels**0.5

    def decode(latents: Tensor, grid: tuple[int, int]) -> Tensor:
        tiles = (latents[0].float() @ matrix).view(*grid, side, side, 3)
        return (0.5 + 0.15 * tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)).clamp(0, 1)

    return decode


def _vae(path: Path, device: torch.device) -> Decode:
    vae = load_vae(path, torch.float32).to(device).requires_grad_(False)

    def decode(latents: Tensor, grid: tuple[int, int]) -> Tensor:
        picture = vae.decode(tokens_to_grid(latents.float(), grid))[0]
        return ((picture + 1) / 2).clamp(0, 1).movedim(0, -1)

    return decode


def _random_texts(config: DenoiserConfig, length: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(PROMPTS), 1, length, config.num_text_layers, config.enc_hidden_dim)
    return list(torch.randn(shape, generator=generator).bfloat16().to(device))


def _encoded(path: Path, device: torch.device) -> list[Tensor]:
    file = open_encoder(path)
    ids = [file.tokenizer(prompt).ids for prompt in PROMPTS]
    found = TextEncoder(file, torch.bfloat16).encode(ids, device)
    return [features.to(device) for features in found]
