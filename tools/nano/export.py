"""Writes the nano models as published: Lens' folder in diffusers' layout, weights in bf16, experts in MXFP4.

``python -m tools.nano.export --random OUT`` writes both variants with random weights, to try things with.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lens_core.config import LENS, LENS_TURBO, Variant
from lens_core.loading import check_component
from lens_core.tiny import models
from lens_core.tiny.folder import (
    Written,
    write_denoiser_config,
    write_encoder_config,
    write_index,
    write_tokenizer,
    write_vae,
)
from lens_core.tiny.tokenizer import tiny_tokenizer
from lens_core.weights import variant_metadata

from .configs import DENOISER, GUIDANCE, VAE, encoder_config

Weights = dict[str, Tensor]
# Lens with nano's guidance.
NANO = replace(LENS, cfg=GUIDANCE)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def export(
    folder: Path,
    denoiser: Weights,
    encoder: Weights | None,
    vae: Weights | None,
    tokenizer_json: str | None,
    variant: Variant,
) -> list[Path]:
    """Write one variant; returns the files. Existing files are never replaced.

    Weights are under the checkpoint's names, of any floating dtype: the encoder's ``model.layers...`` with
    dense experts [E, rows, columns], ``model.norm`` and ``lm_head``; the VAE's as in diffusers. None leaves a
    part out: Turbo has a transformer alone and takes the rest from Lens' folder. What was written is then
    opened as a loader would; raises its error where names or shapes are others.
    """
    written = Written(folder)
    write_denoiser_config(written, ".", DENOISER)
    written.tensors(f"transformer/{WEIGHTS}", _bf16(denoiser), variant_metadata(variant))
    check_component(folder, "denoiser")
    if vae is not None:
        write_index(written, ".")
        write_vae(written, ".", VAE, _bf16(vae))
        check_component(folder, "vae")
    if encoder is not None and tokenizer_json is not None:
        write_tokenizer(written, ".", tokenizer_json)
        write_encoder_config(written, ".", encoder_config(len(encoder["model.embed_tokens.weight"])))
        written.tensors("text_encoder/model.safetensors", models.packed_encoder(encoder))
        check_component(folder, "encoder")
    return written.files


def export_random(out: Path, seed: int = 0) -> list[Path]:
    """Both variants, ``out``/lens and ``out``/lens-turbo, with random weights and the tiny tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = encoder_config(tokenizer.get_vocab_size())
    encoder = models.encoder_weights(config, generator)
    vae = models.vae_weights(generator, VAE)
    base, turbo = (models.denoiser_weights(generator, DENOISER) for _ in range(2))
    files = export(out / "lens", base, encoder, vae, tokenizer.to_str(), NANO)
    return files + export(out / "lens-turbo", turbo, None, None, None, LENS_TURBO)


def _bf16(weights: Weights) -> Weights:
    return {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in sorted(weights.items())
    }


def main() -> int:
    """Write random weights and print the files."""
    parser = argparse.ArgumentParser(prog="python -m tools.nano.export", description=__doc__)
    parser.add_argument(
        "--random", type=Path, required=True, metavar="OUT", help="an empty folder, or a new one"
    )
    parser.add_argument("--seed", type=int, default=0, help="other weights for another seed")
    args = parser.parse_args()
    try:
        files = export_random(args.random, args.seed)
    except FileExistsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in files:
        print(f"{path.stat().st_size:>10,}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
