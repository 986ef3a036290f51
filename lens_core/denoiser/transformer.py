"""The denoiser: text features, latents and noise level in, velocity out.

Without Triton this is, operation by operation, the definition in plain PyTorch that faster paths are held
to. Traps that the checkpoint sets: values are not normalised and reach 1.4e5, the residual stream 3e7, so
fp16 overflows (bf16 or fp32 only); text features reach 1e4 and are normalised before anything else sees
them; the output norm takes scale before shift, the opposite of FLUX.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DenoiserConfig
from ..kernels import EAGER_BLOCK, EAGER_LINEAR, choose_block, choose_linear
from ..kernels.block import modulate
from ..ops import Attention, Operations, padding_mask
from ..quant.layer_format import LayerFormat
from ..quant.linear import Packed
from ..quantized import QuantizedLinear, form_of
from .block import LensBlock, Shared, streams_of
from .graph import BlockGraphs
from .modulation import Modulation
from .nag import Negative, TwoPrompts
from .run import DenoiserRun


def round_sigma(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise level as the reference's model sees it: sigma * 1000 and back, in ``dtype``.

    In bf16 this moves sigma by up to 0.4 %, which shows in the picture, so it belongs to parity.
    """
    return (sigma * 1000).to(dtype) / 1000


def time_features(sigma: Tensor, channels: int) -> Tensor:
    """Sinusoidal features [B, channels] in fp32 of sigma [B]: cosines first, argument 1000 sigma."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
    angle = 1000 * sigma.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Two linears around a SiLU: [B, channels] -> [B, H]."""

    def __init__(self, channels: int, hidden: int, operations: Operations, **place: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(channels, hidden, **place)
        self.linear_2 = operations.Linear(hidden, hidden, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """Holds ``timestep_embedder`` under the checkpoint's name."""

    def __init__(self, config: DenoiserConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        channels, hidden = config.time_channels, config.hidden_size
        self.timestep_embedder = TimestepEmbedder(channels, hidden, operations, **place)


class OutputNorm(nn.Module):
    """LayerNorm without weights, then scale and shift from the time embedding (in that order)."""

    def __init__(self, config: DenoiserConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        self.linear = operations.Linear(config.hidden_size, 2 * config.hidden_size, **place)
        self.eps = config.norm_eps

    def table(self, temb: Tensor) -> Tensor:
        """Time embedding [B, H] -> scale and shift [B, 2 H]."""
        return self.linear(F.silu(temb))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        scale, shift = table.unsqueeze(1).chunk(2, dim=-1)
        return modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift, scale)


class Places(Protocol):
    """Where the blocks' weights are, if not simply in the blocks: brings them in turn."""

    def ready(self, device: torch.device) -> Sequence[LensBlock]: ...
    def modulators(self, device: torch.device) -> Sequence[LensBlock]: ...


class LensDenoiser(nn.Module):
    """Lens' dual-stream MMDiT. Parameter names are the published checkpoint's.

    Letters: B batch, S text tokens, N = h * w image tokens, L captured layers, H hidden size.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        operations: Operations = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.places: Places | None = None
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        hidden, text = config.hidden_size, config.enc_hidden_dim
        self.img_in = operations.Linear(config.in_channels, hidden, **place)
        self.txt_norm = nn.ModuleList(
            operations.RMSNorm(text, eps=config.text_norm_eps, **place) for _ in range(config.num_text_layers)
        )
        self.txt_in = operations.Linear(text * config.num_text_layers, hidden, **place)
        self.time_text_embed = TimeTextEmbed(config, operations, **place)
        self.transformer_blocks = nn.ModuleList(
            LensBlock(config, operations, last=index == config.num_layers - 1, **place)
            for index in range(config.num_layers)
        )
        self.norm_out = OutputNorm(config, operations, **place)
        self.proj_out = operations.Linear(hidden, config.in_channels, **place)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        grid: tuple[int, int],
        text_real: Tensor | None = None,
        attention: Attention | None = None,
        run: DenoiserRun | None = None,
        graphs: BlockGraphs | None = None,
        entry: Hashable = None,
        negative: Negative | None = None,
    ) -> Tensor:
        """Velocity [B, N, C] of latents [B, N, C] at noise level sigma [B] in [0, 1].

        ``text`` is [B, S, L, text hidden] or ``embed_text``'s [B, S, H], S = 0 for an empty prompt; ``grid``
        is (h, w) with h * w = N; ``text_real`` [B, S] marks real tokens, None when all are (no mask is
        built); ``attention`` None is the fastest here; ``run`` keeps what the steps of one picture share,
        ``graphs`` recorded launches; ``entry`` names what is denoised by what text for the run's step cache;
        ``negative`` is kept away from by attention guidance (see ``nag``).
        """
        run = DenoiserRun() if run is None else run
        img = self.img_in(latents)
        txt = text if text.ndim == 3 else self.embed_text(text)
        modulation = run.modulation(self, sigma, img.dtype)
        prompts = None
        if negative is not None:
            txt, text_real, prompts = negative.after(txt, text_real)
        shared = self.shared(img, txt, grid, text_real, attention, run, prompts)
        through = run.through(graphs, entry, sigma)
        img = through(self.ready(img.device), streams_of(img, txt), modulation.tables(), shared)[0]
        return self.project_out(img, modulation)

    @property
    def blocks(self) -> Sequence[LensBlock]:
        """The blocks, in order."""
        return cast(Sequence[LensBlock], self.transformer_blocks)

    def ready(self, device: torch.device) -> Sequence[LensBlock]:
        """The blocks in order for a step on ``device``, each ready until the next is asked for."""
        return list(self.blocks) if self.places is None else self.places.ready(device)

    def modulators(self, device: torch.device) -> Sequence[LensBlock]:
        """The same for the blocks' modulation."""
        return self.blocks if self.places is None else self.places.modulators(device)

    def shared(
        self,
        img: Tensor,
        txt: Tensor,
        grid: tuple[int, int],
        text_real: Tensor | None,
        attention: Attention | None,
        run: DenoiserRun,
        prompts: TwoPrompts | None = None,
    ) -> Shared:
        """What all blocks share in a forward with streams img [B, N, H] and txt [B, S, H], of one prompt or
        of two."""
        mask = None if text_real is None else padding_mask(text_real, img.shape[1], img.dtype)
        trained = (img, txt, *self.parameters()) if torch.is_grad_enabled() else ()
        if any(x.requires_grad for x in trained):  # a training node: only the definitions have gradients
            kernels, linears = EAGER_BLOCK, EAGER_LINEAR
        else:
            kernels = choose_block(img.device, img.dtype, self.config.attention_head_dim)
            linears = choose_linear(img.device, img.dtype)
        lengths = [txt.shape[1]] if prompts is None else [prompts.wanted, txt.shape[1] - prompts.wanted]
        rotary, *more = (run.rotary(self, grid, length, img.device) for length in lengths)
        if more:  # the unwanted prompt's tokens are where the wanted one's are
            rotary = torch.cat([rotary, more[0][:, img.shape[1] :]], dim=1)
        bounded = () if kernels.attend is None else run.bounded(self, img)
        return Shared(
            kernels,
            linears,
            attention,
            rotary,
            mask,
            self.weight_of,
            self.form_of,
            self.packed_of,
            bounded,
            prompts=prompts,
        )

    def project_out(self, img: Tensor, modulation: Modulation) -> Tensor:
        """Image stream [B, N, H] -> velocity [B, N, C]."""
        return self.proj_out(self.norm_out(img, modulation.out))

    def weight_of(self, norm: Any, x: Tensor) -> Tensor:
        """A norm's weight for use beside x; a caller whose operations offload or patch it says otherwise."""
        return norm.weight

    def form_of(self, layer: nn.Module) -> LayerFormat | None:
        """How a linear is quantised, if it is; a caller with quantised linears of its own says otherwise."""
        return form_of(layer)

    def packed_of(self, layer: nn.Module, device: torch.device) -> Packed | None:
        """A quantised linear's weight, where it is at hand on ``device``; None: the layer itself must be
        asked. A caller with quantised linears of its own says otherwise."""
        return layer.packed() if isinstance(layer, QuantizedLinear) else None

    def embed_text(self, text: Tensor) -> Tensor:
        """[B, S, L, text hidden] -> [B, S, H]."""
        if not text.shape[1]:
            return text.new_zeros(text.shape[0], 0, self.config.hidden_size)
        layers = text.unbind(2)
        normed = [norm(layer) for norm, layer in zip(self.txt_norm, layers, strict=True)]
        return self.txt_in(torch.cat(normed, dim=-1))

    def embed_sigma(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] -> time embedding [B, H], with the reference's rounding of sigma."""
        features = time_features(round_sigma(sigma, dtype), self.config.time_channels)
        return self.time_text_embed.timestep_embedder(features.to(dtype))
