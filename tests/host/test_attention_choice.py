"""Which attention the denoiser runs: LensAccelerate's choice, below an override by another node."""

from __future__ import annotations

import pytest
import torch

from lens_core.tiny import models
from tests.compare import relative_l2
from tests.host.helpers import random_context

BLOCKS = models.DENOISER.num_layers
FORWARDS = 4  # two steps, prompt and negative
# The same fp32 sums in another order over two steps. Measured: 1.1e-6 at most.
SAME = 1e-5


@pytest.fixture
def choose(host, tiny):
    """A MODEL of LensAccelerate with this attention."""

    def run(attention, model=tiny.model):
        return host.run("LensAccelerate", model=model, cuda_graphs=False, attention=attention)[0]

    return run


@pytest.fixture
def host_calls(monkeypatch):
    """What ComfyUI's attention, PyTorch's as on NVIDIA GPUs, is called with: (largest value, mask)."""
    from comfy.ldm.modules import attention

    own, calls = attention.attention_pytorch, []

    def spy(q, k, v, heads, mask=None, **kwargs):
        calls.append((v.abs().max(), mask))
        assert kwargs["skip_reshape"] and heads == q.shape[1]
        return own(q, k, v, heads, mask=mask, **kwargs)

    monkeypatch.setattr(attention, "attention_pytorch", spy)
    monkeypatch.setattr(attention, "optimized_attention", spy)
    return calls


@pytest.fixture
def flash_calls(host, monkeypatch):
    """FlashAttention-3 is installed and takes fp32 too; shapes [B, T, heads, D] of its q and k."""
    module, calls = host.module("lens_core.kernels.flash3"), []

    def kernel(q, k, v):
        calls.append((q.shape, k.shape))
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)

    monkeypatch.setattr(module, "why_not", lambda *_: None)
    monkeypatch.setattr(module, "DTYPES", (torch.float32,))
    monkeypatch.setattr(module, "_kernel", lambda: kernel)
    return calls


def test_auto_is_lens_own_where_comfyui_has_pytorchs(draw, choose, host_calls):
    draw(model=choose("auto"))
    assert host_calls == []


def test_auto_is_the_one_that_comfyui_was_started_with(draw, choose, host_calls, monkeypatch):
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "attention_pytorch", None)
    draw(model=choose("auto"))
    assert len(host_calls) == FORWARDS * BLOCKS


def test_host_is_comfyuis(draw, choose, host_calls):
    """Also where Lens' own would be faster; its values are moved into the range of fp16 for it."""
    want = draw(model=choose("auto"))["samples"]
    got = draw(model=choose("host"))["samples"]
    assert len(host_calls) == FORWARDS * BLOCKS
    assert relative_l2(got, want) < SAME
    largest = max(value for value, _ in host_calls)
    assert 0 < largest < 1, "values of the tiny model are about one"


def test_flash_attention_3(draw, choose, tiny, flash_calls):
    want = draw()["samples"]
    model = choose("flash_attn3")
    assert relative_l2(draw(model=model)["samples"], want) < SAME
    assert len(flash_calls) == FORWARDS * BLOCKS
    heads, dim = models.DENOISER.num_attention_heads, models.DENOISER.attention_head_dim
    tokens = tiny.positive[0][0].shape[1]
    assert {k for _, k in flash_calls} == {(1, 24 + text, heads, dim) for text in (0, tokens)}


def test_flash_attention_3_leaves_masks_to_pytorch(draw, choose, flash_calls):
    """Two prompts padded to one length; the empty negative has no mask."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:] = 0
    both = {"samples": torch.zeros(2, 128, 6, 4)}
    inputs = {"positive": [[random_context(2, 9), {"attention_mask": mask}]], "latent": both}
    got = draw(model=choose("flash_attn3"), **inputs)["samples"]
    assert len(flash_calls) == FORWARDS // 2 * BLOCKS
    assert {k[1] for _, k in flash_calls} == {24}
    assert relative_l2(got, draw(**inputs)["samples"]) < SAME


def test_flash_attention_3_leaves_other_dtypes_to_pytorch(host, draw, choose, flash_calls, monkeypatch):
    """A node behind this one may have the MODEL compute in another."""
    monkeypatch.setattr(host.module("lens_core.kernels.flash3"), "DTYPES", (torch.bfloat16,))
    assert relative_l2(draw(model=choose("flash_attn3"))["samples"], draw()["samples"]) < SAME
    assert flash_calls == []


@pytest.mark.parametrize("attention", ["auto", "host", "flash_attn3"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_override_wins(draw, choose, tiny, host_calls, flash_calls, attention, first):
    """Before the node or after it."""
    seen = []

    def override(original, *args, **kwargs):
        seen.append(kwargs["transformer_options"]["block_index"])
        return 0.5 * original(*args, **kwargs)

    def with_override(model):
        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = override
        return clone

    want = draw(model=with_override(tiny.model))["samples"]
    seen.clear()
    model = choose(attention, with_override(tiny.model)) if first else with_override(choose(attention))
    assert torch.equal(draw(model=model)["samples"], want)
    assert len(seen) == FORWARDS * BLOCKS and flash_calls == []


def test_flash_attention_3_that_cannot_run_is_refused_at_the_node(tiny, choose):
    """In the words of what is missing, and with the way out."""
    with pytest.raises(Exception) as caught:
        choose("flash_attn3")
    assert type(caught.value).__name__ == "SettingError"
    assert str(caught.value) == (
        "FlashAttention-3 cannot be used: the denoiser computes in float32, and it takes 16-bit floats. "
        "Set attention to auto, the fastest that is here."
    )


def test_what_is_asked_about_flash_attention_3(host, choose, monkeypatch):
    """The MODEL's own device, dtype and heads."""
    asked = []
    monkeypatch.setattr(host.module("lens_core.kernels.flash3"), "why_not", lambda *call: asked.append(call))
    choose("flash_attn3")
    assert asked == [(torch.device("cpu"), torch.float32, models.DENOISER.attention_head_dim, None)]
