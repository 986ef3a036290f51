"""Which layers the modes quantise, what they weigh at full size, and what ``auto`` chooses."""

from __future__ import annotations

import re

import pytest
import torch

from lens_core.config import DenoiserConfig, is_modulation
from lens_core.denoiser import LensDenoiser
from lens_core.quant import policy
from lens_core.quant.policy import MODES, choose
from lens_core.quantized import linear_sizes, replace_linears

GB = 1_000_000_000
# The table of 20 noise levels, in bf16.
TABLE = 20 * 48 * 2 * 9216 * 2


@pytest.fixture(scope="module")
def published() -> LensDenoiser:
    """The published sizes, without memory."""
    return LensDenoiser(DenoiserConfig(), dtype=torch.bfloat16, device="meta")


@pytest.fixture(scope="module")
def steps(published) -> dict[str, int]:
    """Its linears' numbers of weights, those of the modulation left out."""
    sizes = linear_sizes(published)
    return {name: rows * columns for name, (rows, columns) in sizes.items() if not is_modulation(name)}


def test_what_is_quantised(published):
    quantized = {name for name in linear_sizes(published) if policy.is_quantized(name)}
    assert len(quantized) == 480  # four of attention and six of the MLPs in each of 48 blocks
    rest = {re.sub(r"\d+", "N", name) for name in set(linear_sizes(published)) - quantized}
    assert rest == {
        "img_in",
        "txt_in",
        "proj_out",
        "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_N",
        "transformer_blocks.N.img_mod.N",
        "transformer_blocks.N.txt_mod.N",
    }


@pytest.mark.parametrize("mode", MODES)
def test_weight_while_drawing(mode, steps):
    """At most 2.9 GB in 8 bits and 1.7 in 4, the modulation released and its table there."""
    model = LensDenoiser(DenoiserConfig(), dtype=torch.bfloat16, device="meta")
    layers = [(name, layer) for name, layer in model.named_modules() if policy.is_quantized(name)]
    form = MODES[mode].form
    for name, layer in layers:
        replace_linears(model, {name: policy.empty((layer.out_features, layer.in_features), form)})
    weights = sum(
        tensor.nbytes
        for name, tensor in model.named_parameters()
        if not is_modulation(name.rpartition(".")[0])
    )
    assert weights + TABLE <= (2.9 if form.bits == 8 else 1.7) * GB
    # Norms and biases are not in the estimate: 3 MB. Scales of rows are not either: 3 MB.
    assert abs(policy.weight_bytes(steps, MODES[mode]) - weights) < 10_000_000


@pytest.mark.parametrize(
    "free, capability, mode",
    [
        (31, (12, 0), "none"),
        (9, (7, 5), "none"),
        (7, (7, 5), "int8_weight_only"),
        (7, (8, 6), "int8_dynamic"),
        (7, (8, 9), "int8_dynamic"),
        (7, (9, 0), "int8_dynamic"),
        (7, (12, 0), "float8_dynamic"),
        (7, None, "int8_weight_only"),
        (4.8, (7, 5), "int4_weight_only"),
        (4.8, (8, 9), "int4_weight_only"),
        (4.8, (12, 0), "nvfp4"),
        (1, (8, 9), "int4_weight_only"),
    ],
)
def test_auto(steps, free, capability, mode):
    chosen, why = choose(steps, int(free * GB), capability, "an XYZ 3000")
    assert chosen == mode
    assert why.startswith(f"{free:.1f} GB of an XYZ 3000 are free")


def test_auto_without_a_gpu(steps):
    chosen, why = choose(steps, None, None, "the CPU")
    assert chosen == "none" and "the CPU" in why
