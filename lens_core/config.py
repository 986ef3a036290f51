"""Every architecture number of Lens, once.

The sizes of a concrete model are read off its checkpoint (``weights.detect``), so the same classes
serve the published model and the tiny ones of the tests; what a checkpoint cannot tell (epsilons,
RoPE settings, captured layers) is a default here. Source: the published Lens reference and GPT-OSS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Pixels of one image token along one side: the VAE's 8 times the 2x2 packing.
PIXELS_PER_TOKEN = 16
# Channels of one image token: FLUX.2's VAE has 32, packed 2x2; the nano model's VAE has 8.
LATENT_CHANNELS = (128, 32)
# Residual streams after these GPT-OSS layers (0-based) are the text features.
CAPTURED_LAYERS = (5, 11, 17, 23)
# The day in the chat template around a prompt: the one that ComfyUI's own encoder uses.
TEMPLATE_DATE = "2026-05-23"


@dataclass(frozen=True)
class DenoiserConfig:
    """The dual-stream MMDiT. Defaults are the published model (4,104,225,152 parameters)."""

    num_layers: int = 48
    num_attention_heads: int = 24
    attention_head_dim: int = 64
    in_channels: int = 128
    enc_hidden_dim: int = 2880
    num_text_layers: int = 4
    axes_dims_rope: tuple[int, int, int] = (8, 28, 28)
    rope_theta: float = 10000.0
    time_channels: int = 256
    text_norm_eps: float = 1e-5
    norm_eps: float = 1e-6
    # 1e-6 in the reference; ComfyUI's own Lens has 1e-5 here.
    qk_norm_eps: float = 1e-6

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size / 3 * 8)


@dataclass(frozen=True)
class EncoderConfig:
    """GPT-OSS-20B as a feature extractor. RoPE is YaRN; Lens' own config.json leaves it out."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 24
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    sliding_window: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_original_length: int = 4096
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    # How the expert banks are packed: a key of quant.FORMATS.
    expert_format: str = "mxfp4"

    def is_sliding(self, layer: int) -> bool:
        """Even layers see the last ``sliding_window`` positions, odd ones the whole prompt."""
        return layer % 2 == 0


# Where the encoder's layers lie: "auto" by the free memory, "gpu" all of them on the GPU, "stream" each
# one copied there as it runs, "cpu" computed there.
PLACEMENTS = ("auto", "gpu", "stream", "cpu")


@dataclass(frozen=True)
class EncoderOptions:
    """How prompts become features; the defaults are what everybody should use."""

    dense: bool = False  # experts as bf16 instead of packed MXFP4: about 45 GB
    placement: str = "auto"  # one of PLACEMENTS
    feature_cache: Path | None = None  # folder of features already encoded; None: no such folder
    extended: bool = False  # prompts above the trained 512 tokens are not cut
    date: str = TEMPLATE_DATE  # YYYY-MM-DD in the chat template


ENCODER_OPTIONS = EncoderOptions()


def is_modulation(name: str) -> bool:
    """Whether a module of this name is the linear of a block's modulation."""
    return name.endswith((".img_mod.1", ".txt_mod.1"))


@dataclass(frozen=True)
class Variant:
    """A published checkpoint and the settings it was published with."""

    name: str
    steps: int
    cfg: float


LENS = Variant("Lens", steps=20, cfg=5.0)
LENS_TURBO = Variant("Lens-Turbo", steps=4, cfg=1.0)
LENS_BASE = Variant("Lens-Base", steps=50, cfg=5.0)
