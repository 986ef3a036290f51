"""How much memory a forward takes beside the weights: arithmetic alone."""

from __future__ import annotations

from ..config import DenoiserConfig

# Activations of one token at a forward's peak, in a block: as many as these, each as wide as the stream or as
# the MLP. At the published width that is 20,480 numbers, 40,960 bytes in bf16. Measured with our kernels:
# 0.1763 GB at 1024 x 1024 and 0.3413 GB at 1440 x 1440, each with 200 tokens of text.
_STREAM_WIDE = 8
_MLP_WIDE = 2
# Plain PyTorch also keeps what our kernels never write: norms, products before gates, rotated heads.
_UNFUSED = 2
# The noise levels whose modulation is evaluated at once, at most (see denoiser.modulation).
_LEVELS = 64
# Scale, shift and gate of the attention and of the MLP, for image and text.
_TABLES = 2 * 6


def denoiser_bytes(
    config: DenoiserConfig,
    *,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    element_size: int = 2,
    fused: bool = True,
    quantized: bool = False,
    levels: int = _LEVELS,
) -> int:
    """Bytes of a forward of ``batch`` pictures beside the weights, with the modulation's tables.

    ``element_size`` is that of the dtype computed in; ``fused``: by our kernels; ``quantized``: the largest
    weight may have to be dequantised for its product; ``levels``: noise levels of the run.
    """
    inner, hidden = config.mlp_hidden_size, config.hidden_size
    of_token = _MLP_WIDE * inner + _STREAM_WIDE * hidden
    activations = batch * (image_tokens + text_tokens) * of_token * (1 if fused else _UNFUSED)
    tables = levels * config.num_layers * _TABLES * hidden
    weight = 2 * inner * hidden if quantized else 0  # the MLP's first two, multiplied as one
    return (activations + tables + weight) * element_size


def encoder_bytes(tokens: int) -> int:
    """Bytes of encoding a chat of so many tokens, template included, beside the layers and their buffers.

    Measured with GPT-OSS-20B in MXFP4 by our kernels on an H200: 71 MB at 460 tokens, 142 at 872, 195 at
    1160. A process' first run takes 40 MB more, for the kernels' tests of themselves.
    """
    return 175_000 * tokens
