"""The arithmetic of what a forward needs, against what was measured."""

from __future__ import annotations

import pytest

from lens_core.config import DenoiserConfig
from lens_core.memory.estimate import denoiser_bytes
from lens_core.tiny import models

LENS = DenoiserConfig()
TEXT = 200


def estimated(config: DenoiserConfig = LENS, **changes) -> int:
    sizes = {"batch": 1, "image_tokens": 4096, "text_tokens": TEXT, "levels": 0}
    return denoiser_bytes(config, **{**sizes, **changes})


@pytest.mark.parametrize("tokens, measured", [(64 * 64, 0.1763e9), (90 * 90, 0.3413e9)])
def test_as_measured(tokens, measured):
    """On a GPU, with our kernels, in bf16."""
    assert estimated(image_tokens=tokens) == pytest.approx(measured, rel=0.01)


def test_linear_in_batch_and_tokens():
    one = estimated()
    assert estimated(batch=3) == 3 * one
    assert estimated(image_tokens=0) + estimated(text_tokens=0) == one
    assert estimated(image_tokens=4096 + TEXT, text_tokens=0) == one


def test_without_our_kernels_and_in_fp32():
    one = estimated()
    assert estimated(fused=False) == 2 * one
    assert estimated(fused=False, element_size=4) == 4 * one


def test_a_dequantised_weight():
    assert estimated(quantized=True) - estimated() == pytest.approx(25e6, rel=0.02)


def test_tables_of_the_noise_levels():
    """1.77 MB a level; unless told, as many levels as are evaluated at once."""
    assert estimated(levels=20) - estimated() == 20 * 48 * 2 * 6 * 1536 * 2
    assert denoiser_bytes(LENS, batch=1, image_tokens=4096, text_tokens=TEXT) == estimated(levels=64)


def test_a_smaller_model_needs_less():
    tiny = models.DENOISER
    width = tiny.hidden_size / LENS.hidden_size
    assert estimated(tiny) == pytest.approx(width * estimated(), rel=0.01)
