"""lens_core's denoiser behind the forward that ComfyUI calls, with every hook of its own models.

Wrappers, ``patches`` (post_input, double_block), ``patches_replace``, control residuals and the
attention override see the same names and shapes as in ComfyUI's own Lens, so nodes written for that
work here.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import comfy.ops
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ...lens_core.config import DenoiserConfig
from ...lens_core.denoiser import DenoiserRun, LensDenoiser, Negative
from ...lens_core.denoiser.block import Shared, Tables, run_blocks, streams_of
from ...lens_core.denoiser.modulation import Modulation
from ...lens_core.quant.layer_format import LayerFormat
from ...lens_core.quant.linear import Packed
from ...lens_core.sampling import grid_to_tokens, tokens_to_grid
from .attention import host_attention
from .quantized import at_hand, form_of, packed_of

# Where transformer_options keep the DenoiserRun of the picture that is being sampled.
RUN = "lens_run"
# And the BlockGraphs of the MODEL, if the user wants them.
GRAPHS = "lens_graphs"
# And the Negative that attention is kept away from (its text not yet embedded where hooks change weights).
NAG = "lens_nag"
_HOOKED = "another node works between the blocks or on their attention, and must see them all"


class HostDenoiser(LensDenoiser):
    """The denoiser over latents [B, C, h, w] and text features [B, S, L * text hidden]."""

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
        if wrappers:  # EasyCache's writes into x, which in fp32 is the latent that the sampler goes on with
            x = x.clone()
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
        run = options.get(RUN) or DenoiserRun()
        grid = (x.shape[-2], x.shape[-1])
        img, txt = self.img_in(grid_to_tokens(x)), self.text_stream(context, x)
        img, txt = _patched(options, "post_input", {"img": img, "txt": txt})
        prompts = None
        if NAG in options:
            negative = self._negative(options[NAG], img, len(options.get("cond_or_uncond", (0,))))
            txt, attention_mask, prompts = negative.after(txt, attention_mask)
        modulation = run.modulation(self, timestep, img.dtype)
        shared = self.shared(img, txt, grid, attention_mask, host_attention(options), run, prompts)
        if hooked(options, control):
            if run.cache is not None:
                run.cache.hinder(_HOOKED)
            img = self._hooked_blocks(x, img, txt, modulation, shared, options, control)
        else:
            through = run.through(options.get(GRAPHS), *_entry(options, timestep))
            img = through(self.ready(img.device), streams_of(img, txt), modulation.tables(), shared)[0]
        return tokens_to_grid(self.project_out(img, modulation), grid).contiguous()

    def text_stream(self, context: Tensor | None, x: Tensor) -> Tensor:
        """The text stream [B, S, H] of features [B, S, L * text hidden], or of itself; S = 0 without any."""
        layers, width = self.config.num_text_layers, self.config.enc_hidden_dim
        if context is None:
            return x.new_zeros(x.shape[0], 0, self.config.hidden_size)
        if context.shape[-1] != layers * width:
            return context
        return self.embed_text(context.unflatten(-1, (layers, width)))

    def _negative(self, negative: Negative, img: Tensor, entries: int) -> Negative:
        """It beside the stream img [B, N, H] of ``entries`` conditionings: a row for each picture of each."""

        def rows(x: Tensor) -> Tensor:
            repeated = comfy.utils.repeat_to_batch_size(x.to(img.device), len(img) // entries)
            return repeated.repeat(entries, *(1 for _ in x.shape[1:]))

        text = rows(self.text_stream(negative.text.to(img), img))
        return replace(negative, text=text, real=None if negative.real is None else rows(negative.real))

    def weight_of(self, norm: Any, x: Tensor) -> Tensor:
        """A norm's weight, from where ComfyUI keeps it and patched if it is to be."""
        weight = norm.weight
        if weight.device == x.device and weight.dtype == x.dtype and not norm.weight_function:
            return weight
        return comfy.ops.cast_bias_weight(norm, x)[0]

    def form_of(self, layer: Any) -> LayerFormat | None:
        """How a linear is quantised, if it computes with its weight as that is stored."""
        return form_of(layer)

    def packed_of(self, layer: Any, device: torch.device) -> Packed | None:
        """Its weight, if that lies on ``device`` as it is stored; else ComfyUI must bring it."""
        if not at_hand(layer, device):
            return None
        comfy.ops.run_every_op()
        return packed_of(layer.weight, layer.form)

    def _hooked_blocks(
        self,
        x: Tensor,
        img: Tensor,
        txt: Tensor,
        modulation: Modulation,
        shared: Shared,
        options: dict[str, Any],
        control: dict[str, Any] | None,
    ) -> Tensor:
        """The image stream after all blocks, with whatever others want to see or change in between."""
        options |= {"total_blocks": len(self.blocks), "block_type": "double"}
        for index, tables in enumerate(modulation.tables()):
            options["block_index"] = index
            img, txt = self._block(index, img, txt, modulation.temb, tables, shared, options)
            img, txt = _patched(
                options, "double_block", {"img": img, "txt": txt, "x": x, "block_index": index}
            )
            img = _add_control(img, control, index)
        return img

    def _block(
        self,
        index: int,
        img: Tensor,
        txt: Tensor,
        temb: Tensor,
        tables: Tables,
        shared: Shared,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """One block, or what a ``patches_replace`` entry puts in its place."""
        block = self.blocks[index]

        def run(args: dict[str, Any]) -> dict[str, Tensor]:
            own = args.get("transformer_options", options)
            given = replace(
                shared,
                rotary=args["pe"],
                mask=args.get("attn_mask"),
                attention=host_attention(own),
                text_queries=True,
            )
            changed = args["vec"] is not temb
            streams = streams_of(args["img"], args["txt"])
            out = run_blocks([block], streams, [block.tables(args["vec"]) if changed else tables], given)
            return {"img": out[0], "txt": out[1] if len(out) > 1 else args["txt"]}

        args = {
            "img": img,
            "txt": txt,
            "vec": temb,
            "pe": shared.rotary,
            "attn_mask": shared.mask,
            "transformer_options": options,
        }
        instead = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
        out = run(args) if instead is None else instead(args, {"original_block": run})
        return out["img"], out["txt"]


def hooked(options: dict[str, Any], control: dict[str, Any] | None) -> bool:
    """Whether anyone wants to see or change what passes between the blocks."""
    return bool(
        control
        or options.get("patches", {}).get("double_block")
        or options.get("patches_replace", {}).get("dit")
        or "optimized_attention_override" in options
    )


def _entry(options: dict[str, Any], timestep: Tensor) -> tuple[Hashable, Tensor]:
    """Which conditioning entries a forward is for, and the sampler's noise level [B]."""
    entries = zip(options.get("uuids", ()), options.get("cond_or_uncond", ()), strict=False)
    return tuple(entries), options.get("sigmas", timestep)


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
