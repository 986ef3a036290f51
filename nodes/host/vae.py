"""FLUX.2's VAE as a ComfyUI VAE.

comfy.sd.VAE picks its network in its constructor, from a fixed list; this subclass sets the same
attributes around lens_core's module instead, so every VAE node, tiled or not, works unchanged.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ...lens_core.config import PIXELS_PER_TOKEN
from ...lens_core.loading import load_vae
from .progress import on_progress, on_strip
from .recovery import CLOSE_OTHERS, with_recovery

# Of a picture in strips the peak is known; the allocator takes up to so much more for it, in gaps.
_RESERVE = 1.3
# Where not even the VAE alone on the GPU has room for the picture: 512 pixels of it at once, of which the
# outer 128 are blended. ComfyUI's own tiles are for VAEs of 8 pixels; here they would be 1024 pixels wide.
_TILE, _OVERLAP = 32, 8


class _WholePatcher(comfy.model_patcher.ModelPatcher):
    """Loads all weights or none: its layers are plain torch's, which cannot fetch theirs as they run. ComfyUI
    asks for none with --novram, and would leave the VAE where the latents are not."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load=True)


class LensHostVAE(comfy.sd.VAE):
    """comfy.sd.VAE over lens_core's module; latents are packed and normalised, [B, C, h, w]."""

    def __init__(self, module: Any, dtype: torch.dtype, device: torch.device) -> None:
        management = comfy.model_management
        self.first_stage_model = module
        self.device, self.vae_dtype = device, dtype
        self.output_device = management.intermediate_device()
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.latent_channels = 4 * module.model.config.latent_channels  # packed 2x2
        self.latent_dim, self.output_channels = 2, 3
        self.downscale_ratio = self.upscale_ratio = PIXELS_PER_TOKEN
        self.downscale_index_formula = self.upscale_index_formula = None
        self._way = {"frugal_memory": False}
        self.memory_used_decode = functools.partial(_decode_bytes, module, device, self._way)
        self.memory_used_encode = functools.partial(_encode_bytes, module, device)
        self.process_input, self.process_output = _to_signed, _to_unsigned
        self.extra_1d_channel = self.pad_channel_value = self.format_encoded = self.size = None
        self.crop_input, self.handles_tiling, self.not_video = True, False, False
        self.audio_sample_rate = 44100  # read by generic nodes, of no meaning here
        # Its convolutions are plain torch modules, which ComfyUI moves as a whole.
        self.disable_offload = True
        self.patcher = _WholePatcher(
            module, load_device=device, offload_device=management.vae_offload_device()
        )
        self.model_size()
        self._may_tile = True
        # Cancel between strips of layers, as ComfyUI's own between layers: a CPU takes a while.
        module.on_strip = on_strip

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        """As VAE's, but before a picture is decoded in tiles, whose colours differ from a whole one's, all
        other models leave the GPU and it is tried again, in two thirds of the memory if need be."""

        def again() -> Tensor:
            for attempt in (self._whole, self._whole_frugally):
                with contextlib.suppress(torch.OutOfMemoryError):
                    return attempt(samples_in, vae_options)
            return comfy.sd.VAE.decode_tiled(self, samples_in, _TILE, _TILE, _OVERLAP)

        return with_recovery(
            lambda: self._whole(samples_in, vae_options),
            again,
            what="while decoding",
            device=self.device,
            advice=lambda: [
                "ComfyUI's VAE Decode (Tiled) with a tile_size of 256",
                "fewer or smaller pictures",
                "starting ComfyUI with --cpu-vae",
                CLOSE_OTHERS,
            ],
            needed=lambda: self.patcher.model_size() + self._tile_bytes(samples_in, _TILE, _TILE),
        )

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In ComfyUI's nodes for tiles: the whole picture in two thirds of the memory; in tiles only where
        there is less than that."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._whole_frugally(samples)
        return super().decode_tiled(samples, *args, **kwargs)

    def _whole(self, samples: Tensor, options: dict[str, Any] | None = None) -> Tensor:
        """Pictures [B, H, W, 3]; raises OutOfMemoryError where VAE's would begin anew in tiles."""
        self._may_tile = False
        try:
            return super().decode(samples, options or {})
        finally:
            self._may_tile = True

    def _whole_frugally(self, samples: Tensor, options: dict[str, Any] | None = None) -> Tensor:
        self._way["frugal_memory"] = True
        try:
            return self._whole(samples, {**(options or {}), **self._way})
        finally:
            self._way["frugal_memory"] = False

    def decode_tiled_(
        self, samples: Tensor, tile_x: int = _TILE, tile_y: int = _TILE, overlap: int = _OVERLAP
    ) -> Tensor:
        """VAE's, which ``decode`` calls when memory ran out, even if that was as the VAE was loaded."""
        if not self._may_tile:
            raise torch.OutOfMemoryError("The whole picture does not fit beside the models that are loaded.")
        management = comfy.model_management
        if not any(model is self.patcher for model in management.loaded_models()):
            needed = self._tile_bytes(samples, tile_x, tile_y)
            management.load_models_gpu([self.patcher], memory_required=needed, force_full_load=True)
        return super().decode_tiled_(samples, tile_x, tile_y, overlap)

    def _tile_bytes(self, samples: Tensor, tile_x: int, tile_y: int) -> float:
        """Bytes of decoding one tile of latents [..., h, w]."""
        height, width = samples.shape[-2:]
        return self.memory_used_decode((1, 1, min(tile_y, height), min(tile_x, width)), self.vae_dtype)

    def get_sd(self) -> dict[str, Tensor]:
        """Weights under diffusers' names, as VAESave writes them."""
        weights = super().get_sd()
        return {name.removeprefix("model."): value for name, value in weights.items()}


def _decode_bytes(
    module: Any, device: torch.device, way: dict[str, bool], shape: tuple[int, ...], dtype: torch.dtype
) -> int:
    """Of one picture: the others of a batch wait for their turn."""
    size = comfy.model_management.dtype_size(dtype)
    return int(_RESERVE * module.decode_bytes(*shape[-2:], size, device, **way))


def _encode_bytes(module: Any, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of one picture, as of decoding, and the picture itself."""
    size = comfy.model_management.dtype_size(dtype)
    height, width = (-(-pixels // PIXELS_PER_TOKEN) for pixels in shape[-2:])
    return int(_RESERVE * module.encode_bytes(height, width, size, device)) + 3 * shape[-2] * shape[-1] * size


def _to_signed(image: Tensor) -> Tensor:
    return image * 2 - 1


def _to_unsigned(image: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], in place as ComfyUI's decode expects."""
    return image.add_(1).div_(2).clamp_(0, 1)


def load_host_vae(path: Path) -> LensHostVAE:
    """A file or Lens folder as a VAE."""
    device = comfy.model_management.vae_device()
    dtype = comfy.model_management.vae_dtype(device, [torch.bfloat16, torch.float32])

    def load() -> LensHostVAE:
        return LensHostVAE(load_vae(path, dtype, on_progress()), dtype, device)

    vae = with_recovery(
        load,
        load,
        what=f"while loading {path.name}",
        device=device,
        advice=lambda: ["starting ComfyUI with --cpu-vae", CLOSE_OTHERS],
        needed=lambda: None,
    )
    vae.patcher.cached_patcher_init = (_load_patcher, (path,))
    return vae


def _load_patcher(path: Path, disable_dynamic: bool = False):
    return load_host_vae(path).patcher
