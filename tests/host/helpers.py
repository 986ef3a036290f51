"""What several host tests need: ComfyUI's own Lens network, a record of forward calls, a LoRA file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.quant.mxfp4 import dequantize
from lens_core.tiny import models
from lens_core.weights import open_checkpoint

QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
# The reference's q/k norm epsilon; ComfyUI's own Lens has 1e-5 there.
REFERENCE_QK_EPS = 1e-6

# Layer, LoRA's names of its two matrices, whether an alpha is stored.
LORA_TARGETS = [
    ("transformer_blocks.0.attn.img_qkv", "diffusion_model.{dots}.lora_{A}.weight", False),
    ("transformer_blocks.1.attn.to_out.0", "diffusion_model.{dots}.lora_{A}.weight", True),
    ("transformer_blocks.1.img_mlp.w2", "lora_unet_{lines}.lora_{down}.weight", True),
    ("transformer_blocks.2.txt_mod.1", "lora_unet_{lines}.lora_{down}.weight", False),
    ("txt_in", "lora_unet_{lines}.lora_{down}.weight", True),
]
LORA_RANK = 4


def align_qk_eps(network: Any, eps: float = REFERENCE_QK_EPS) -> None:
    """Give ComfyUI's own Lens network the reference's epsilon in its q/k norms."""
    for block in network.transformer_blocks:
        for name in QK_NORMS:
            getattr(block.attn, name).eps = eps


def fp32_weights(folder: Path) -> dict[str, Tensor]:
    """The tiny denoiser's fp32 tensors under the checkpoint's names."""
    checkpoint = open_checkpoint(folder / "transformer")
    return {name: checkpoint.read(name) for name in checkpoint.header}


def stock_network(folder: Path, qk_eps: float = REFERENCE_QK_EPS) -> Any:
    """ComfyUI's own Lens network with the tiny weights, in fp32."""
    import comfy.ops
    from comfy.ldm.lens.model import LensTransformer2DModel

    config = models.DENOISER
    network = LensTransformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        enc_hidden_dim=config.enc_hidden_dim,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    network.load_state_dict(fp32_weights(folder))
    align_qk_eps(network, qk_eps)
    return network.requires_grad_(False).eval()


@dataclass
class Call:
    """One forward of the diffusion network."""

    batch: int
    text_tokens: int
    sigma: float


@dataclass
class Recorder:
    """A DIFFUSION_MODEL wrapper that notes every forward and changes nothing."""

    calls: list[Call] = field(default_factory=list)

    def __call__(self, executor, x, timestep, context=None, *args, **kwargs):
        tokens = 0 if context is None else context.shape[1]
        self.calls.append(Call(x.shape[0], tokens, float(timestep[0])))
        return executor(x, timestep, context, *args, **kwargs)


def recorded(model: Any) -> tuple[Any, Recorder]:
    """A clone of MODEL whose forwards are noted, and the notes."""
    from comfy.patcher_extension import WrappersMP

    clone, recorder = model.clone(), Recorder()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "lens_tests", recorder)
    return clone, recorder


def random_context(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Text features [B, S, L * H] of the tiny denoiser's width, as large as GPT-OSS's."""
    generator = torch.Generator().manual_seed(seed)
    width = models.DENOISER.num_text_layers * models.DENOISER.enc_hidden_dim
    return 100 * torch.randn(batch, tokens, width, generator=generator)


def random_latent(batch: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Latents [B, 128, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, models.DENOISER.in_channels, *grid, generator=generator)


def write_lora(path: Path, network: Any, strength: float) -> dict[str, Tensor]:
    """Save a LoRA in both naming styles; returns what it adds to each layer at ``strength``."""
    generator = torch.Generator().manual_seed(9)
    stored, deltas = {}, {}
    for name, pattern, has_alpha in LORA_TARGETS:
        rows, columns = network.get_submodule(name).weight.shape
        down = torch.randn(LORA_RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, LORA_RANK, generator=generator)
        words = {"dots": name, "lines": name.replace(".", "_")}
        stored[pattern.format(**words, A="A", down="down")] = down
        stored[pattern.format(**words, A="B", down="up")] = up
        alpha = float(LORA_RANK)
        if has_alpha:
            alpha = 2.0
            prefix = pattern.format(**words, A="A", down="down").split(".lora_")[0]
            stored[f"{prefix}.alpha"] = torch.tensor(alpha)
        deltas[name] = strength * alpha / LORA_RANK * up @ down
    save_file(stored, path)
    return deltas


def comfyui_weights(path: Path) -> dict[str, Tensor]:
    """The encoder in ComfyUI's format: no ``model.``, experts as dense [E, out, in] in fp32."""
    checkpoint = open_checkpoint(path)
    weights = {}
    for name in checkpoint.header:
        key = name.removeprefix("model.")
        if key == "lm_head.weight" or key.endswith("_scales"):
            continue
        tensor = checkpoint.read(name)
        if key.endswith("_blocks"):
            scales = checkpoint.read(name.removesuffix("_blocks") + "_scales")
            weights[key.replace("_blocks", ".weight")] = dequantize(tensor, scales, torch.float32)
        elif ".experts." in key:
            weights[key.replace("_bias", ".bias")] = tensor.float()
        else:
            weights[key] = tensor.float() if tensor.is_floating_point() else tensor
    return weights
