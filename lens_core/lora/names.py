"""Keys of LoRA files in circulation, as tables: prefixes, suffixes, and names of a part of a fused layer.

A key is a prefix or several, a layer's name with dots or with underscores for them, and a suffix. Underscores
are in names too, so such a name is looked up among all layers' names rather than taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Taken off one after the other, until what is left is a layer's name: ``base_model.model.transformer.`` is
# PEFT's around diffusers'. By sd-scripts and musubi ``lora_unet_``, VideoX-Fun ``lora_unet__``, kohya's
# diffusers models ``lora_transformer_``, LyCORIS ``lycoris_``, ComfyUI ``diffusion_model.``.
_PREFIX = re.compile(
    r"^(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer|model|net)\."
    r"|^(?:lora_unet__|lora_unet_|lora_transformer_|lycoris_|lora_|diffusion_model_|transformer_)"
)
# (what a key ends with, the name that ComfyUI's weight adapters know it by). ``default`` stands where PEFT
# has the adapter's name.
_NAMED = r"(?:\.[^.]+)?"
_SUFFIXES: tuple[tuple[str, str], ...] = (
    (rf"\.lora_(?:down|A){_NAMED}\.weight|\.lora_A", "lora_down.weight"),
    (rf"\.lora_(?:up|B){_NAMED}\.weight|\.lora_B", "lora_up.weight"),
    # diffusers before PEFT.
    (r"[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight", "lora_down.weight"),
    (r"[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight", "lora_up.weight"),
    (r"\.lora_mid\.weight", "lora_mid.weight"),
    (r"\.alpha", "alpha"),
    # PEFT's name for the magnitude of DoRA.
    (rf"\.dora_scale|\.lora_magnitude_vector{_NAMED}", "dora_scale"),
    (rf"\.lora_magnitude_vector{_NAMED}\.weight", "dora_scale"),
    *((rf"\.{name}{_NAMED}", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((rf"\.{name}{_NAMED}", name) for name in ("hada_t1", "hada_t2")),
    *((rf"\.{name}{_NAMED}", name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
    *((rf"\.{name}{_NAMED}", name) for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    (r"\.oft_blocks", "oft_blocks"),
    (r"\.rescale", "rescale"),
    # PEFT's and OneTrainer's OFT, which turns inputs; LyCORIS' turns outputs.
    (rf"\.oft_R{_NAMED}\.weight", "oft_R.weight"),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
)
_SUFFIX = tuple((re.compile(rf"(?:{pattern})$"), name) for pattern, name in _SUFFIXES)
# A fused layer's name ends in the left, and names of its parts q, k and v in what follows: those of
# diffusers' joint attention, and the layer's own.
_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("img_qkv", ("to_{}", "img_{}")),
    ("txt_qkv", ("add_{}_proj", "txt_{}")),
)


# Longer keys name no layer, and no suffix is as long as this: what a stranger's file may cost is bounded.
_LONGEST_KEY, _LONGEST_SUFFIX = 512, 80


class Place(NamedTuple):
    """A layer, and which of its q, k and v (0, 1, 2) is meant; None: all of it."""

    layer: str
    part: int | None = None


def split_key(key: str) -> tuple[str, str] | None:
    """A key without its suffix, and the suffix as ComfyUI's adapters name it; None for no key of a LoRA."""
    if len(key) > _LONGEST_KEY:
        return None
    for pattern, name in _SUFFIX:
        match = pattern.search(key, max(0, len(key) - _LONGEST_SUFFIX))
        if match and match.start():
            return key[: match.start()], name
    return None


def places(layers: Iterable[str]) -> dict[str, Place]:
    """Every spelling of the layers' names, without prefixes."""
    dotted: dict[str, Place] = {}
    for layer in layers:
        dotted[layer] = Place(layer)
        for fused, parts in _PARTS:
            if layer.endswith(f".{fused}"):
                stem = layer.removesuffix(fused)
                for pattern in parts:
                    dotted |= {stem + pattern.format(c): Place(layer, i) for i, c in enumerate("qkv")}
    return {name.replace(".", "_"): place for name, place in dotted.items()} | dotted


def find_place(name: str, known: dict[str, Place]) -> Place | None:
    """The layer that a key without its suffix names, with whatever prefixes."""
    while name not in known:
        match = _PREFIX.match(name)
        if match is None:
            return None
        name = name[match.end() :]
    return known[name]
