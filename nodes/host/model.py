"""Lens' denoiser as a ComfyUI MODEL: a BaseModel around lens_core's denoiser, in a ModelPatcher.

The denoiser is built from the operations that ComfyUI picks, so LoRA, offloading and dynamic VRAM
work as for its own models. Two defaults make stock samplers exact: guidance rescaled to the
conditional norm, and the schedule shift of the model's usual size (1024 x 1024) at the variant's published
steps (LensSampler and LensScheduler compute it for the actual size).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from torch import Tensor

from ...lens_core.config import LATENT_CHANNELS, PIXELS_PER_TOKEN, DenoiserConfig, Variant
from ...lens_core.denoiser import LensDenoiser
from ...lens_core.denoiser_file import DenoiserFile
from ...lens_core.errors import SettingError
from ...lens_core.kernels import EAGER_BLOCK, choose_block
from ...lens_core.loading import open_denoiser
from ...lens_core.memory.estimate import denoiser_bytes
from ...lens_core.quant.policy import NONE
from ...lens_core.sampling import empirical_mu, norm_rescaled_guidance
from ...lens_core.vae import unpack
from ...lens_core.weights import variant_at
from ...lens_core.weights.loader import AnyCheckpoint
from .denoiser import GRAPHS, RUN, HostDenoiser
from .preview import colours_beside
from .progress import on_progress
from .quantized import free_for_models, operations
from .reader import host_reader
from .recovery import CLOSE_OTHERS, sample_with_recovery, with_recovery
from .residency import patcher_class
from .run import sample_with_run
from .several_gpus import own_parents

log = logging.getLogger(__name__)
# What the published checkpoints draw at 1024 x 1024, and the nano model at 256 x 256.
_USUAL_TOKENS = dict(zip(LATENT_CHANNELS, (64 * 64, 16 * 16), strict=True))
# Of a prompt whose length is not known: the longest that Lens was trained with.
_TEXT_TOKENS = 512
# More than any GPU has, as ComfyUI itself says it where nothing of a model may stay loaded.
_ALL_THERE_IS = 1e20


class PackedLatents(comfy.latent_formats.LatentFormat):
    """Latents of another VAE than FLUX.2's. Their colours are fitted to the VAE that lies beside the model,
    when previews first ask; without one there are none."""

    spacial_downscale_ratio = PIXELS_PER_TOKEN

    def __init__(self, channels: int, path: Path | None = None) -> None:
        self.latent_channels = channels
        self.path = path
        self.latent_rgb_factors_reshape = unpack

    @property
    def latent_rgb_factors(self) -> list[list[float]] | None:
        """Colours of each unpacked channel, as ComfyUI's previews read them."""
        return None if self._colours is None else self._colours[0].tolist()

    @property
    def latent_rgb_factors_bias(self) -> list[float] | None:
        """The colour of zeros."""
        return None if self._colours is None else self._colours[1].tolist()

    @cached_property
    def _colours(self) -> tuple[Tensor, Tensor] | None:
        return None if self.path is None else colours_beside(self.path, self.latent_channels)


class LensModelConfig(comfy.supported_models_base.BASE):
    """What BaseModel and other packs ask about a model; the keys are those of ComfyUI's own Lens."""

    unet_extra_config: dict[str, Any] = {}
    latent_format = comfy.latent_formats.Flux2
    # fp16 overflows: values reach 1.4e5, the residual stream 3e7.
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    # With this ComfyUI's formula for any model comes to what ``memory_required`` says of our kernels in bf16.
    memory_usage_factor = 2.1

    def __init__(
        self, config: DenoiserConfig, variant: Variant, operations: Any = None, path: Path | None = None
    ) -> None:
        super().__init__(
            {
                "image_model": "lens",
                "in_channels": config.in_channels,
                "out_channels": config.in_channels // 4,
                "num_layers": config.num_layers,
                "num_attention_heads": config.num_attention_heads,
                "enc_hidden_dim": config.enc_hidden_dim,
                "multi_layer_encoder_feature": True,
                "selected_layer_index": tuple(range(config.num_text_layers)),
            }
        )
        self.custom_operations = operations
        channels = config.in_channels
        if channels != self.latent_format.latent_channels:
            self.latent_format = PackedLatents(channels, path)
        tokens = _USUAL_TOKENS.get(channels, _USUAL_TOKENS[LATENT_CHANNELS[0]])
        self.sampling_settings = {"shift": empirical_mu(tokens, variant.steps)}


class LensModel(comfy.model_base.BaseModel):
    """BaseModel whose conditioning is text features [B, S, L * H] and a mask only where it pads."""

    def __init__(self, model_config: LensModelConfig, device: torch.device | str | None = None) -> None:
        flow = comfy.model_base.ModelType.FLUX
        super().__init__(model_config, flow, device=device, unet_model=HostDenoiser)
        # The modulation of the run before and what it belongs to, in RAM (see ``run``).
        self.kept_modulation: tuple[Any, Any] = (None, None)
        self.streamed = False

    @property
    def quantized(self) -> bool:
        """Whether some of its linears are."""
        return self.model_config.custom_operations is not None

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Meanwhile no weight stays on the GPU, and no two forwards are joined into one: the least memory
        that a run can do with."""
        self.streamed = True
        try:
            yield
        finally:
            self.streamed = False

    def memory_required(
        self, input_shape: Sequence[int], cond_shapes: Mapping[str, Sequence[Sequence[int]]] | None = None
    ) -> float:
        """Bytes of one forward beside the weights, for latents [B, C, h, w]; ComfyUI keeps them free.

        Before a run ComfyUI asks for twice the pictures, for prompt and negative. Where no two conditionings
        have the same length, none are evaluated together.
        """
        if self.streamed:
            return _ALL_THERE_IS
        batch, height, width = input_shape[0], *input_shape[-2:]
        lengths = [shape[1] for shape in (cond_shapes or {}).get("c_crossattn", ())]
        if len(lengths) > 1 and len(set(lengths)) == len(lengths):
            batch = -(-batch // 2)
        dtype, config = self.get_dtype_inference(), self.diffusion_model.config
        kernels = choose_block(self._device(), dtype, config.attention_head_dim)
        return denoiser_bytes(
            config,
            batch=batch,
            image_tokens=height * width,
            text_tokens=max(lengths, default=_TEXT_TOKENS),
            element_size=dtype.itemsize,
            fused=kernels is not EAGER_BLOCK,
            quantized=self.quantized,
        )

    def _device(self) -> torch.device:
        """Where it is sampled; between runs, where ComfyUI would."""
        patcher = self.current_patcher
        return comfy.model_management.get_torch_device() if patcher is None else patcher.load_device

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """Of one conditioning entry, before a run: its text, under the name that it has in the run."""
        text = kwargs.get("cross_attn")
        return {} if text is None else {"c_crossattn": list(text.shape)}

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Conditioning of one entry; raises SettingError if another model's encoder made it."""
        out = super().extra_conds(**kwargs)
        text, mask = kwargs.get("cross_attn"), kwargs.get("attention_mask")
        if text is None:
            return out
        require_text(self.model_config, text, kwargs.get("prompt_type", "text"))
        if kwargs.get("hooks") is None:  # once a run; hooks may change the projection's weights at any step
            text = self.embed_text(text, kwargs["device"])
        out["c_crossattn"] = comfy.conds.CONDRegular(text)
        if mask is not None and not bool(mask.all()):
            out["attention_mask"] = comfy.conds.CONDRegular(mask)
        return out

    def embed_text(self, text: Tensor, device: torch.device) -> Tensor:
        """Text features [B, S, L * text hidden] -> the text stream [B, S, H] that the blocks begin with."""
        text = text.to(device, self.get_dtype_inference())
        return self.diffusion_model.text_stream(text, text)

    def _apply_model(
        self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """ComfyUI's, without what the run keeps where a hook has changed the weights since."""
        options = dict(transformer_options or {})
        if getattr(self.current_patcher, "current_hooks", None) is not None:
            run = options.pop(RUN, None)
            if run is not None and run.cache is not None:
                run.cache.hinder("hooks change the weights during the run")
            options.pop(GRAPHS, None)
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)


def require_text(model_config: Any, text: Tensor, which: str) -> None:
    """Raise SettingError unless conditioning [B, S, L * H] is from a Lens encoder of the model's size.

    ``model_config`` is ours or ComfyUI's own Lens'; their keys are the same.
    """
    sizes = model_config.unet_config
    width = sizes["enc_hidden_dim"] * len(sizes["selected_layer_index"])
    if text.ndim != 3 or text.shape[-1] != width:
        raise SettingError(
            f"The {which} conditioning has shape {list(text.shape)}; Lens expects [batch, tokens, "
            f"{width}]. Encode the prompt with a Lens encoder: LensEncoderLoader, or CLIPLoader with "
            "type 'lens'."
        )


def lens_cfg_function(args: dict[str, Any]) -> Tensor:
    """Norm-rescaled guidance for ``sampler_cfg_function``: x - denoised is sigma * velocity."""
    return norm_rescaled_guidance(args["cond"], args["uncond"], args["cond_scale"], dim=1)


def load_model(
    path: Path, dtype: torch.dtype | None, quantization: str = NONE, disable_dynamic: bool = False
):
    """A file or Lens folder as a ModelPatcher, and which published variant it is.

    ``dtype`` None leaves the choice to ComfyUI; ``quantization`` is one of ``policy.CHOICES``. Weights are
    quantised on the GPU, or on the CPU if the GPU has no room for one.
    """
    file = open_denoiser(path)
    variant = variant_at(file.path, file.checkpoint.metadata)
    management = comfy.model_management
    device, offload_device = management.get_torch_device(), management.unet_offload_device()
    supported = LensModelConfig.supported_inference_dtypes
    held = dtype or _dtype_for(file.checkpoint, device, supported)
    cast = management.unet_manual_cast(held, device, supported)
    if dtype != torch.float32 and (cast or held) == torch.float32 and _lacks_bfloat16(device):
        _say_slow()
    mode = file.mode(quantization, device, free_for_models(device))
    quantized = operations(cast or held) if file.stored or mode != NONE else None
    model_config = LensModelConfig(file.config, variant, quantized, path)
    model_config.set_inference_dtype(held, cast)
    model = with_recovery(
        lambda: _filled(file, model_config, mode, device),
        lambda: _filled(file, model_config, mode, torch.device("cpu")),
        what=f"while loading {path.name}",
        device=device,
        advice=lambda: [
            "a file that is quantised already (LensQuantizeModel writes one)",
            "starting ComfyUI without --gpu-only and --highvram",
            CLOSE_OTHERS,
        ],
        needed=lambda: sum(info.nbytes for info in file.checkpoint.header.values()),
    )
    model.device = offload_device
    patcher = patcher_class(disable_dynamic)(model, load_device=device, offload_device=offload_device)
    patcher.set_model_sampler_cfg_function(lens_cfg_function)
    kinds = comfy.patcher_extension.WrappersMP
    patcher.add_wrapper_with_key(kinds.OUTER_SAMPLE, "lens", sample_with_recovery)
    patcher.add_wrapper_with_key(kinds.SAMPLER_SAMPLE, "lens", sample_with_run)
    own_parents(patcher)
    # How ComfyUI makes the same model anew for another device; 0: the first of what is returned.
    patcher.cached_patcher_init = (load_model, (path, dtype, mode), 0)
    return patcher, variant


def _filled(
    file: DenoiserFile, model_config: LensModelConfig, mode: str, quantizing: torch.device
) -> LensModel:
    """A model with the file's weights, on the CPU; those that ``mode`` quantises are on ``quantizing``."""
    model = LensModel(model_config, device="meta")
    file.load(
        model.diffusion_model,
        model.get_dtype(),
        mode=mode,
        structure=LensDenoiser(file.config, device="meta"),
        device=quantizing,
        read=host_reader(file.checkpoint),
        on_tensor=on_progress(),
    )
    return model


def _dtype_for(checkpoint: AnyCheckpoint, device: torch.device, supported: list[torch.dtype]) -> torch.dtype:
    """ComfyUI's choice for the GPU and its start flags, unless a flag asks for what Lens cannot do."""
    parameters = sum(torch.Size(info.shape).numel() for info in checkpoint.header.values())
    chosen = comfy.model_management.unet_dtype(device, parameters, supported, torch.bfloat16)
    if chosen in supported:
        return chosen
    log.warning("ComfyUI was started with a flag for %s; Lens is loaded in bfloat16 instead.", chosen)
    return torch.bfloat16


def _lacks_bfloat16(device: torch.device) -> bool:
    """Whether it is the GPU that has no bfloat16, and not the user who wants none."""
    management = comfy.model_management
    unwanted = management.FORCE_FP32 or comfy.cli_args.args.fp32_unet
    return not (unwanted or management.is_device_cpu(device) or management.should_use_bf16(device))


@cache
def _say_slow() -> None:
    log.warning(
        "This GPU has no bfloat16, so Lens computes in float32, which is slower. float16 is "
        "no way out: Lens' values overflow it."
    )


def with_guidance(model):
    """The MODEL with Lens' guidance, unless it has a guidance of its own.

    Those from LensModelLoader have it already; UNETLoader's get it here.
    """
    if "sampler_cfg_function" in model.model_options:
        return model
    model = model.clone()
    model.set_model_sampler_cfg_function(lens_cfg_function)
    return model


def require_lens(model, does: str = "samples", instead: str = ", or use ComfyUI's own KSampler") -> None:
    """Raise SettingError unless MODEL is Lens, ours or ComfyUI's own; with what the node ``does`` with it."""
    own = getattr(comfy.model_base, "Lens", LensModel)
    network = getattr(model, "model", None)
    if not isinstance(network, (LensModel, own)):
        raise SettingError(
            f"The model is {type(network).__name__}; this node {does} Lens only. Connect "
            f"LensModelLoader, or UNETLoader with a Lens file{instead}."
        )


def source_of(patcher: Any) -> Path | None:
    """The file or folder that ComfyUI would load a MODEL, or a CLIP's or VAE's patcher, from again."""
    init = patcher.cached_patcher_init
    return Path(init[1][0]) if init is not None and isinstance(init[1][0], (str, Path)) else None
