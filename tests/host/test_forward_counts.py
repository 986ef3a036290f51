"""How often the network runs, on what, and that no mask costs anything where nothing is padded."""

from __future__ import annotations

import pytest
import torch

from lens_core.tiny import models
from tests.compare import relative_l2
from tests.host.helpers import random_context, recorded

STEPS = 3
BLOCKS = models.DENOISER.num_layers


def masks_at_attention(model) -> tuple:
    """A clone of MODEL that notes the mask of every attention call, and the notes."""
    clone, seen = model.clone(), []

    def spy(original, *args, **kwargs):
        seen.append(kwargs.get("mask"))
        return original(*args, **kwargs)

    clone.model_options["transformer_options"]["optimized_attention_override"] = spy
    return clone, seen


def conditioning(features, mask=None) -> list:
    return [[features, {} if mask is None else {"attention_mask": mask}]]


def test_cfg_1_never_sees_the_negative(tiny, draw):
    model, recorder = recorded(tiny.model)
    broken = conditioning(torch.full((1, 5, 256), torch.nan))
    latents = draw(model=model, negative=broken, cfg=1.0, steps=STEPS)["samples"]
    tokens = tiny.positive[0][0].shape[1]
    assert [(call.batch, call.text_tokens) for call in recorder.calls] == STEPS * [(1, tokens)]
    assert latents.isfinite().all()


def test_blank_negative_is_a_forward_without_text(tiny, draw):
    """At cfg 5 two forwards a step, one of them over picture tokens alone."""
    model, recorder = recorded(tiny.model)
    draw(model=model, cfg=5.0, steps=STEPS)
    tokens = tiny.positive[0][0].shape[1]
    assert tokens > 0 and len(recorder.calls) == 2 * STEPS
    for step in range(STEPS):
        pair = recorder.calls[2 * step : 2 * step + 2]
        assert sorted(call.text_tokens for call in pair) == [0, tokens]
        assert pair[0].sigma == pair[1].sigma


def test_negative_of_another_length_is_a_forward_of_its_own(tiny, draw):
    model, recorder = recorded(tiny.model)
    draw(model=model, negative=conditioning(random_context(1, 5)), steps=STEPS)
    assert len(recorder.calls) == 2 * STEPS
    assert {call.text_tokens for call in recorder.calls} == {5, tiny.positive[0][0].shape[1]}


def test_negative_of_the_same_length_shares_one_forward(tiny, draw):
    """ComfyUI joins what has the same shape; nothing of ours keeps it from that."""
    model, recorder = recorded(tiny.model)
    tokens = tiny.positive[0][0].shape[1]
    draw(model=model, negative=conditioning(random_context(1, tokens)), steps=STEPS)
    assert [(call.batch, call.text_tokens) for call in recorder.calls] == STEPS * [(2, tokens)]


def test_the_same_for_stock_ksampler(host, tiny):
    for cfg, forwards in ((1.0, STEPS), (5.0, 2 * STEPS)):
        model, recorder = recorded(tiny.model)
        host.run(
            "KSampler",
            model=model,
            seed=1,
            steps=STEPS,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            positive=tiny.positive,
            negative=tiny.negative,
            latent_image={"samples": torch.zeros(1, 128, 6, 4)},
            denoise=1.0,
        )
        assert len(recorder.calls) == forwards


def test_a_batch_is_one_forward(tiny, draw):
    model, recorder = recorded(tiny.model)
    draw(model=model, latent={"samples": torch.zeros(3, 128, 6, 4)}, cfg=1.0, steps=STEPS)
    assert [call.batch for call in recorder.calls] == STEPS * [3]


def test_no_mask_at_attention_when_all_tokens_are_real(tiny, draw):
    model, seen = masks_at_attention(tiny.model)
    draw(model=model, steps=STEPS)
    assert seen == 2 * STEPS * BLOCKS * [None]


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_no_mask_at_attention_for_a_mask_of_ones(tiny, draw, kind):
    """ComfyUI's own CLIP sends a mask even where nothing is padded, and an empty one for no text."""
    [(features, _)] = tiny.positive
    positive = conditioning(features, torch.ones(features.shape[:2], dtype=kind))
    negative = conditioning(tiny.negative[0][0], torch.ones(1, 0, dtype=kind))
    model, seen = masks_at_attention(tiny.model)
    latents = draw(model=model, positive=positive, negative=negative, steps=STEPS)["samples"]
    assert seen == 2 * STEPS * BLOCKS * [None]
    assert torch.equal(latents, draw(steps=STEPS)["samples"])


def test_padding_arrives_as_a_mask(tiny, draw):
    """A batch of two prompts padded to one length: each picture is drawn as from its own prompt."""
    features = random_context(2, 9)
    real = torch.ones(2, 9, dtype=torch.long)
    real[0, 4:] = 0
    model, seen = masks_at_attention(tiny.model)
    both = {"samples": torch.zeros(2, 128, 6, 4)}
    latents = draw(model=model, positive=conditioning(features, real), latent=both, cfg=1.0)["samples"]
    assert len(seen) == 2 * BLOCKS
    for mask in seen:
        assert mask.shape == (2, 1, 1, 24 + 9) and mask.dtype == torch.float32
        hidden = mask[:, 0, 0] < -1e30
        assert hidden[:, 24:].equal(~real.bool()) and not hidden[:, :24].any()
        assert mask.isfinite().all(), "-inf becomes NaN in some attention kernels"
    short = {"samples": both["samples"][:1]}
    alone = draw(positive=conditioning(features[:1, :4]), latent=short, cfg=1.0)["samples"]
    # fp32 sums of another length over two steps; measured: 2e-7.
    assert relative_l2(latents[:1], alone) < 1e-5
