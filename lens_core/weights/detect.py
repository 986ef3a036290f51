"""What a checkpoint is, from its header alone: which component, and its sizes.

Nothing here reads a tensor. A file of another model is named as what it looks like, so that the
error can say what came instead of what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ..config import LENS, LENS_BASE, LENS_TURBO, DenoiserConfig, Variant
from ..errors import CheckpointError
from .gguf import GgufCheckpoint
from .keymap import DENOISER, rename
from .loader import AnyCheckpoint
from .reader import Checkpoint

Shape = tuple[int, ...]
# Lens has 48, GPT-OSS-20B 24.
_MOST_LAYERS = 128

_LENS = r"(?:^|\.)transformer_blocks\.0\.attn\.img_qkv\.weight$"
# (what it is, a pattern that one of its tensor names matches); the first row that matches wins.
_KINDS: tuple[tuple[str, str], ...] = (
    ("a LoRA", r"\.(?:lora_down|lora_A|lora_up|lora_B|hada_w1_a|lokr_w1)(?:\.|$)"),
    ("a Lens denoiser quantised by SDNQ", r"transformer_blocks\.0\.attn\.img_qkv\.zero_point$"),
    ("a Lens denoiser quantised for ComfyUI", r"transformer_blocks\.0\.attn\.img_qkv\.comfy_quant$"),
    ("a Lens denoiser", _LENS),
    ("a GPT-OSS encoder in MXFP4", r"^(?:model\.)?layers\.0\.mlp\.experts\.gate_up_proj_blocks$"),
    (
        "a GPT-OSS encoder quantised for ComfyUI",
        r"^(?:model\.)?layers\.0\.mlp\.experts\.gate_up_proj\.(?:comfy_quant|weight_scale)$",
    ),
    (
        "a GPT-OSS encoder in bf16 for ComfyUI",
        r"^(?:model\.)?layers\.0\.mlp\.experts\.gate_up_proj\.weight$",
    ),
    ("a GPT-OSS encoder in bf16", r"^(?:model\.)?layers\.0\.mlp\.experts\.gate_up_proj$"),
    ("a GPT-OSS encoder in OpenAI's own layout", r"^block\.0\.mlp\.mlp1_weight\.blocks$"),
    ("a FLUX.2 VAE", r"(?:^|\.)bn\.running_mean$"),
    ("a FLUX denoiser", r"(?:^|\.)double_blocks\.0\.img_attn\.qkv\.weight$"),
    ("a FLUX denoiser (diffusers)", r"(?:^|\.)single_transformer_blocks\.0\.attn\.to_q\.weight$"),
    ("a Qwen-Image denoiser", r"(?:^|\.)transformer_blocks\.0\.attn\.add_q_proj\.weight$"),
    ("a Stable Diffusion checkpoint", r"(?:^|\.)input_blocks\.0\.0\.weight$"),
    ("a CLIP text encoder", r"text_model\.encoder\.layers\.0\.|transformer\.resblocks\.0\."),
    ("a T5 text encoder", r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$"),
    ("a VAE of another model", r"(?:^|\.)decoder\.conv_in\.weight$"),
    ("a language model", r"(?:^|\.)layers\.0\.self_attn\.q_proj\.weight$"),
)
# An encoder's kind goes on with its layout, of which all are read: see encoder_layouts.LAYOUTS.
_EXPECTED = {"denoiser": "a Lens denoiser", "encoder": "a GPT-OSS encoder", "vae": "a FLUX.2 VAE"}
_ADVICE = {
    "denoiser": "Choose a file such as lens_turbo_bf16.safetensors, or a Lens folder.",
    "encoder": (
        "Choose gpt-oss-20b as OpenAI publishes it (a folder of shards, or its original/ folder), a file "
        "of it for ComfyUI (nvfp4, bf16), a GGUF of it with MXFP4 experts, or a Lens folder."
    ),
    "vae": "Choose flux2-vae.safetensors, or a Lens folder.",
}


def describe(checkpoint: AnyCheckpoint) -> str:
    """What a file with these tensors looks like, for an error message."""
    if isinstance(checkpoint, GgufCheckpoint):
        return _describe_gguf(checkpoint)
    names = list(checkpoint.header)
    for kind, pattern in _KINDS:
        search = re.compile(pattern).search
        if any(search(name) for name in names):
            return kind
    return f"an unknown kind of model ({names[0]}, ...)" if names else "a file without tensors"


def _describe_gguf(checkpoint: GgufCheckpoint) -> str:
    architecture = checkpoint.metadata.get("general.architecture", "an unnamed architecture")
    parts = checkpoint.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        return f"one of {parts} parts of a GGUF (llama-gguf-split --merge joins them)"
    # By its tensors: nobody has agreed on an architecture's name for it.
    if any(re.search(_LENS, name) for name in checkpoint.header):
        return "a Lens denoiser in GGUF"
    if architecture != "gpt-oss":
        return f"a GGUF of {architecture}"
    if "blk.0.ffn_gate_exps.weight" not in checkpoint.header:
        return "a GGUF of gpt-oss without experts"
    return "a GPT-OSS encoder in GGUF"


def require(checkpoint: AnyCheckpoint, component: str) -> str:
    """What the checkpoint is; raises CheckpointError unless it holds ``component``: denoiser, encoder
    or vae."""
    kind, expected = describe(checkpoint), _EXPECTED[component]
    if kind != expected and not (component != "vae" and kind.startswith(f"{expected} ")):
        raise CheckpointError(f"{checkpoint.name} is {kind}; expected {expected}. {_ADVICE[component]}")
    return kind


def denoiser_config(checkpoint: AnyCheckpoint) -> DenoiserConfig:
    """Sizes of a Lens denoiser."""
    require(checkpoint, "denoiser")
    source = rename(checkpoint.header, DENOISER)
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


def is_ldm_vae(checkpoint: Checkpoint) -> bool:
    """Whether a FLUX.2 VAE has the CompVis names rather than diffusers'."""
    return any(".mid.block_1." in name for name in checkpoint.header)


def vae_config(checkpoint: Checkpoint) -> dict:
    """AutoencoderKLFlux2's arguments for a FLUX.2 VAE without a config.json."""
    ldm = is_ldm_vae(checkpoint)
    source = {re.sub(r"^(?:first_stage_model|vae)\.", "", name): name for name in checkpoint.header}
    shape = shape_reader(checkpoint, source)
    if ldm:
        encoder = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(4)]
        decoder = [f"decoder.up.{i}.block.0.conv1.weight" for i in range(4)]
        layers = count(source, r"^encoder\.down\.0\.block\.(\d+)\.")
    else:
        encoder = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(4)]
        decoder = [f"decoder.up_blocks.{3 - i}.resnets.0.conv1.weight" for i in range(4)]
        layers = count(source, r"^encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    return {
        "block_out_channels": [shape(name, 4)[0] for name in encoder],
        "decoder_block_out_channels": [shape(name, 4)[0] for name in decoder],
        "layers_per_block": layers,
        "latent_channels": shape("decoder.conv_in.weight", 4)[1],
    }


def variant_of(name: str, metadata: dict[str, str] | None = None) -> Variant:
    """The published checkpoint that a file is, from metadata ``lens.variant`` or from its name.

    Lens itself (RL-tuned) when neither says otherwise.
    """
    text = str((metadata or {}).get("lens.variant") or name).lower()
    if "turbo" in text:
        return LENS_TURBO
    return LENS_BASE if "base" in re.split(r"[^a-z0-9]+", text) else LENS


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
