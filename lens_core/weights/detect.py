"""The sizes of a model, from its checkpoint's header alone; what it is, ``kind`` tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ..config import DenoiserConfig
from ..errors import CheckpointError
from .keymap import DENOISER, PREFIXES, rename
from .kind import require
from .loader import AnyCheckpoint

Shape = tuple[int, ...]
# Lens has 48, GPT-OSS-20B 24.
_MOST_LAYERS = 64


def denoiser_config(checkpoint: AnyCheckpoint) -> DenoiserConfig:
    """Sizes of a Lens denoiser."""
    require(checkpoint, "denoiser")
    source = rename(checkpoint.header, DENOISER, file=checkpoint.name)
    shape = shape_reader(checkpoint, source)
    if "img_in.weight" in source and not checkpoint.header[source["img_in.weight"]].floating:
        hidden, channels = shape("img_in.bias", 1)[0], shape("proj_out.bias", 1)[0]  # its numbers are packed
    else:
        hidden, channels = shape("img_in.weight", 2)
    return DenoiserConfig(
        num_layers=count(source, r"^transformer_blocks\.(\d+)\."),
        num_attention_heads=hidden // DenoiserConfig.attention_head_dim,
        in_channels=channels,
        enc_hidden_dim=shape("txt_norm.0.weight", 1)[0],
        num_text_layers=count(source, r"^txt_norm\.(\d+)\."),
    )


def is_ldm_vae(checkpoint: AnyCheckpoint) -> bool:
    """Whether a FLUX.2 VAE has the CompVis names rather than diffusers'."""
    return any(".mid.block_1." in name for name in checkpoint.header)


def vae_config(checkpoint: AnyCheckpoint) -> dict:
    """AutoencoderKLFlux2's arguments for a FLUX.2 VAE without a config.json."""
    ldm = is_ldm_vae(checkpoint)
    source = rename(checkpoint.header, PREFIXES["vae"], file=checkpoint.name)
    shape = shape_reader(checkpoint, source)
    if ldm:
        encoder = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(4)]
        decoder = [f"decoder.up.{i}.block.0.conv1.weight" for i in range(4)]
        layers = count(source, r"^encoder\.down\.0\.block\.(\d+)\.")
    else:
        encoder = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(4)]
        decoder = [f"decoder.up_blocks.{3 - i}.resnets.0.conv1.weight" for i in range(4)]
        layers = count(source, r"^encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    down, up = ([shape(name, 4)[0] for name in names] for names in (encoder, decoder))
    return {
        "block_out_channels": down,
        "decoder_block_out_channels": up,
        # No tensor tells: FLUX.2's 32, or one for each channel of a smaller level.
        "norm_num_groups": min(32, *down),
        "layers_per_block": layers,
        "latent_channels": shape("decoder.conv_in.weight", 4)[1],
    }


def shape_reader(checkpoint: AnyCheckpoint, source: dict[str, str]) -> Callable[[str, int], Shape]:
    """A function (name, rank) -> shape that raises CheckpointError where the file has no such tensor.

    ``source`` gives the stored name of each (``keymap.rename``).
    """

    def shape(name: str, rank: int) -> Shape:
        found = checkpoint.header[source[name]].shape if name in source else None
        if found is None or len(found) != rank or 0 in found:
            has = "no tensor" if found is None else f"the odd shape {list(found)} for"
            raise CheckpointError(
                f"{checkpoint.name} has {has} {name}, so its sizes cannot be read. "
                "The file is incomplete; download it again."
            )
        return found

    return shape


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that ``pattern``'s group finds in the names, at most _MOST_LAYERS: a
    module is built of so many, before it is compared with the file."""
    search = re.compile(pattern).search
    found = {int(match[1]) for match in map(search, names) if match}
    return min(max(found, default=-1) + 1, _MOST_LAYERS)
