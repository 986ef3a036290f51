"""Bytes that computing takes beside the weights, as arithmetic."""

from __future__ import annotations


def denoiser_bytes(
    image_tokens: int,
    text_tokens: int,
    batch: int,
    element_size: int,
    hidden: int,
    inner: int,
    channels: int,
) -> int:
    """At the most in a block's MLP: five tensors of the streams' size H (before and after the norm, before
    and after attention, its update) and three of the MLP's inner size, for each of B * (N + S) tokens."""
    tokens = batch * (image_tokens + text_tokens)
    return tokens * element_size * (5 * hidden + 3 * inner + 4 * channels)


def table_bytes(levels: int, blocks: int, hidden: int, element_size: int) -> int:
    """The modulation of a run's noise levels: 6 H for image and text of each block."""
    return levels * blocks * 2 * 6 * hidden * element_size


def encoder_bytes(tokens: int) -> int:
    """Measured with GPT-OSS-20B."""
    return 40_000_000 + tokens * 350_000
