"""lens_core's denoiser behind the forward that ComfyUI calls, with every hook of its own models.

Wrappers, ``patches`` (post_input, double_block), ``patches_replace``, control residuals and the
attention override see the same names and shapes as in ComfyUI's own Lens, so nodes written for that
work here.
"""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...lens_core.config import DenoiserConfig
from ...lens_core.denoiser import LensDenoiser
from ...lens_core.ops import padding_mask
from ...lens_core.sampling import grid_to_tokens, tokens_to_grid


class HostDenoiser(LensDenoiser):
    """The denoiser over latents [B, C, h, w] and text features [B, S, L * H]."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_layers: int,
        num_attention_heads: int,
        enc_hidden_dim: int,
        selected_layer_index: tuple[int, ...],
        operations: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **_: Any,  # keys of ComfyUI's model config that follow from the others
    ) -> None:
        config = DenoiserConfig(
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            in_channels=in_channels,
            enc_hidden_dim=enc_hidden_dim,
            num_text_layers=len(selected_layer_index),
        )
        super().__init__(config, operations, dtype, device)
        self.dtype = dtype

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x [B, C, h, w], timestep = sigma [B] -> velocity like x. Without context: no text."""
        options = {} if transformer_options is None else transformer_options
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, options, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        control: dict[str, Any] | None = None,
        **_: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        grid = (x.shape[-2], x.shape[-1])
        img = self.img_in(grid_to_tokens(x))
        txt = self.embed_text(self._features(context, x))
        img, txt = _patched(options, "post_input", {"img": img, "txt": txt})
        temb = self.embed_sigma(timestep, img.dtype)
        rotary = self.rotary(grid, txt.shape[1], img.device)
        mask = None
        if attention_mask is not None:
            mask = padding_mask(attention_mask, img.shape[1], img.dtype)

        options |= {"total_blocks": len(self.transformer_blocks), "block_type": "double"}
        for index in range(len(self.transformer_blocks)):
            options["block_index"] = index
            img, txt = self._block(index, img, txt, temb, rotary, mask, options)
            img, txt = _patched(
                options, "double_block", {"img": img, "txt": txt, "x": x, "block_index": index}
            )
            img = _add_control(img, control, index)
        return tokens_to_grid(self.project_out(img, temb), grid).contiguous()

    def _features(self, context: Tensor | None, x: Tensor) -> Tensor:
        layers, width = self.config.num_text_layers, self.config.enc_hidden_dim
        if context is None:
            return x.new_zeros(x.shape[0], 0, layers, width)
        return context.reshape(*context.shape[:2], layers, width)

    def _block(
        self,
        index: int,
        img: Tensor,
        txt: Tensor,
        temb: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """One block, or what a ``patches_replace`` entry puts in its place."""
        block = self.transformer_blocks[index]
        heads = self.config.num_attention_heads

        def run(args: dict[str, Any]) -> dict[str, Tensor]:
            own = args.get("transformer_options", options)

            def attention(q: Tensor, k: Tensor, v: Tensor, joint: Tensor | None) -> Tensor:
                return optimized_attention(
                    q, k, v, heads, mask=joint, skip_reshape=True, transformer_options=own
                )

            new_img, new_txt = block(
                args["img"], args["txt"], args["vec"], args["pe"], args.get("attn_mask"), attention
            )
            return {"img": new_img, "txt": new_txt}

        args = {
            "img": img,
            "txt": txt,
            "vec": temb,
            "pe": rotary,
            "attn_mask": mask,
            "transformer_options": options,
        }
        replace = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
        out = run(args) if replace is None else replace(args, {"original_block": run})
        return out["img"], out["txt"]


def _patched(options: dict[str, Any], name: str, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The two streams after the patches of one kind."""
    for patch in options.get("patches", {}).get(name, ()):
        args |= patch({**args, "transformer_options": options})
    return args["img"], args["txt"]


def _add_control(img: Tensor, control: dict[str, Any] | None, index: int) -> Tensor:
    """The image stream with a control model's residual for this block added."""
    residuals = (control or {}).get("input") or ()
    if index >= len(residuals) or residuals[index] is None:
        return img
    add = residuals[index]
    return torch.cat([img[:, : add.shape[1]] + add, img[:, add.shape[1] :]], dim=1)
