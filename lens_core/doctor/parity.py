"""Whether components compute on this computer what their reference implementations do, with the same weights.

Encoder: transformers. VAE: diffusers. Denoiser: ComfyUI's own Lens, which the caller brings, as nothing here
knows of ComfyUI. Always measured from the reference in float32. In float32 the bound is fixed; in 16 bits it
is a multiple of what the reference itself loses in them, so it needs no knowledge of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from ..errors import MissingPackage, SettingError
from ..loading import build_denoiser, load_vae, open_denoiser, open_encoder
from ..sampling import grid_to_tokens
from ..text_encoder import TextEncoder
from ..vae import LensVAE
from . import references
from .references import DenoiserReference
from .report import FAULTS, Finding, sentence

log = logging.getLogger(__name__)
PROMPT = "A red fox in the snow, photographed at dawn with an 85mm lens at f/2."
# Small models differ by 3e-6 at most (tests): both sum in another order. Large ones sum more numbers in more
# layers, and trained weights amplify it. What is wrong shows more: another epsilon of a norm makes 1e-3.
EXACT, _WHY_EXACT = 1e-4, "float32 summed in another order"
# Ours rounds where the reference does or less often; half as much again is another arithmetic.
_SLACK = 1.5
# Grid of the denoiser's and the VAE's input, not square so that rows and columns cannot be confused.
_GRID, _TEXT_TOKENS = (24, 16), 20
# Exact in bf16 as is sigma * 1000: implementations round it at different places.
_SIGMA = 0.5
# What torch, the other package and activations take beside weights.
_OVERHEAD = 1_000_000_000
_JUDGED = {"whole": "relative L2", "median": "median"}
Place = dict[str, Any]


def encoder_parity(path: Path, place: Place, tokenizer_places: Sequence[Path] = ()) -> Finding:
    """Features of one prompt, all captured layers, beside transformers' GptOssModel."""
    references.transformers_classes()
    file = open_encoder(path, tokenizer_places)
    text = TextEncoder(file, place["dtype"])
    ids = file.tokenizer(PROMPT).ids
    # Packed tensors that lie in the file as they are held are mapped and take no memory.
    mapped = any(name.endswith(("_blocks", ".blocks")) for name in file.checkpoint.header)
    config = file.config
    layer = 3 * config.num_local_experts * config.hidden_size * config.intermediate_size * 4
    require_room(layer * 13 // 10 + (0 if mapped else text.total), layer * 13 // 10, place["device"])
    (got,) = text.encode([ids], place["device"])
    own = got.shape[1]

    def want(dtype: torch.dtype) -> Tensor:
        found = references.transformers_features(text, ids, {**place, "dtype": dtype})
        return found[-own:].flatten(1)

    # A token whose fourth and fifth expert are nearly tied may get either: the median is what counts.
    return compared("transformers", got[0].flatten(1), want, place["dtype"], by="median")


def denoiser_parity(path: Path, place: Place, reference: DenoiserReference) -> Finding:
    """The velocity of one forward on random latents and text."""
    file, dtype = open_denoiser(path), place["dtype"]
    parameters = sum(torch.Size(info.shape).numel() for info in file.checkpoint.header.values())
    size = parameters * dtype.itemsize
    block = 4 * parameters // max(file.config.num_layers, 1)
    require_room(size + 2 * block, size + 2 * block, place["device"])
    model = build_denoiser(file, dtype).to(place["device"])
    config = file.config
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, *_GRID, generator=generator)
    text = torch.randn(1, _TEXT_TOKENS, config.num_text_layers, config.enc_hidden_dim, generator=generator)
    text *= 100  # about as large as GPT-OSS' features
    sigma = torch.tensor([_SIGMA], device=place["device"])
    got = model(grid_to_tokens(latents.to(**place)), sigma, text.to(**place), _GRID)

    def want(dtype: torch.dtype) -> Tensor:
        there = {**place, "dtype": dtype}
        network = reference(config, dtype)
        blocks = cast(nn.ModuleList, network.transformer_blocks)
        references.fill(network, list(blocks), references.denoiser_weights(file, model), there)
        return grid_to_tokens(network(latents.to(**there), sigma, text.flatten(2).to(**there)))[0]

    return compared("ComfyUI's own Lens", got[0], want, dtype)


def vae_parity(path: Path, place: Place) -> Finding:
    """A small picture, decoded in strips, beside diffusers' AutoencoderKLFlux2."""
    vae = load_vae(path, torch.float32)
    size = sum(tensor.nbytes for tensor in vae.state_dict().values())
    decoding = 2 * vae.decode_bytes(*_GRID, 4, torch.device("cpu"))
    require_room(3 * size + decoding, size + decoding, place["device"])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4 * vae.model.config.latent_channels, *_GRID, generator=generator)

    def want(dtype: torch.dtype) -> Tensor:
        return _tokens(references.diffusers_pictures(path, vae, latents, {**place, "dtype": dtype}))

    ours: LensVAE = load_vae(path, place["dtype"]).to(place["device"])
    return compared("diffusers", _tokens(ours.decode(latents.to(**place))), want, place["dtype"])


def _tokens(images: Tensor) -> Tensor:
    """Pictures [1, 3, 16 h, 16 w] -> [N, 3 * 16 * 16], a row for each token."""
    cells = images[0].unflatten(1, (_GRID[0], -1)).unflatten(3, (_GRID[1], -1))
    return cells.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def compared(
    against: str,
    got: Tensor,
    want: Callable[[torch.dtype], Tensor],
    dtype: torch.dtype,
    by: str = "whole",
) -> Finding:
    """How far tokens ``got`` [N, C] in ``dtype`` are from the reference's in float32, and how far they may.

    ``by`` is the distance that is judged: "whole" or "median".
    """
    exact = want(torch.float32)
    facts = distances(got, exact)
    bound, why = EXACT, _WHY_EXACT
    spelled = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        own = distances(want(dtype), exact)[by]
        bound, why = max(_SLACK * own, EXACT), f"{_SLACK} x what {against} itself loses in {spelled}"
    broken = not facts[by] <= bound
    text = f"{'DIFFERS from' if broken else 'as'} {against} in float32, computed in {spelled}: relative L2 "
    text += f"{facts['whole']:.1e}, tokens' median {facts['median']:.1e}, worst {facts['worst']:.1e}, least "
    text += f"cosine {facts['cosine']:.6f}; {_JUDGED[by]} may be {bound:.1e} ({why})"
    return Finding("", text, broken, {**facts, "bound": bound, "judged": by})


def distances(got: Tensor, want: Tensor) -> dict[str, float]:
    """Relative L2 of [N, C] over everything, the rows' median and worst, and the rows' least cosine."""
    got, want = got.double().cpu(), want.double().cpu()
    rows = (got - want).norm(dim=-1) / want.norm(dim=-1)
    return {
        "whole": ((got - want).norm() / want.norm()).item(),
        "median": rows.median().item(),
        "worst": rows.max().item(),
        "cosine": torch.cosine_similarity(got, want, dim=-1).min().item(),
    }


def require_room(ram: int, gpu: int, device: torch.device) -> None:
    """Log what a comparison needs and what is free; raises SettingError where that is not enough."""
    needs = {"RAM": (ram + _OVERHEAD, psutil.virtual_memory().available)}
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        needs["GPU memory"] = (gpu + _OVERHEAD, free + reserved)
    for kind, (needed, free) in needs.items():
        said = f"comparing needs about {needed / 1e9:.1f} GB of {kind}, and {free / 1e9:.1f} GB are free"
        log.info("Parity: %s.", said)
        if needed > free:
            raise SettingError(f"{said}. Close other programs, or compare on a computer with more.")


@contextmanager
def precise():
    """Meanwhile float32 is float32: NVIDIA's convolutions take 10 bits of it otherwise."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


def tried(name: str, compare: Callable[[], Finding]) -> Finding:
    """A comparison under a name, or in words why there is none."""
    try:
        with torch.inference_mode(), precise():
            return replace(compare(), name=name)
    except (SettingError, MissingPackage) as error:
        return Finding(name, f"not compared: {sentence(error)}")
    except FAULTS as error:
        return Finding(name, f"the comparison FAILED: {sentence(error)}", broken=True)
