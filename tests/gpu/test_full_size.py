"""The published sizes on a GPU: rounding of bf16, ComfyUI's own Lens beside ours, a real server.

Run with ``scripts/test -m gpu tests/gpu`` on a machine with 48 GB of VRAM or more.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lens_core.loading import load_denoiser
from scripts.comfy_server import PACK, ComfyServer, error_of
from scripts.workflow import set_input, to_prompt
from tests.compare import relative_l2

pytestmark = pytest.mark.gpu
DENOISER, ENCODER = "lens_turbo_bf16.safetensors", "gpt_oss_20b_mxfp4.safetensors"


def comfyui_lens(state: dict[str, torch.Tensor]):
    """ComfyUI's own Lens with these weights and the reference's q and k epsilon."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.ldm.lens.model
    import comfy.ops

    with torch.device("meta"):
        model = comfy.ldm.lens.model.LensTransformer2DModel(operations=comfy.ops.disable_weight_init)
    model.load_state_dict(state, assign=True)
    for block in model.transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k):
            norm.eps = 1e-6
    return model


def bf16_offsets(full_models: Path, generator, grid: tuple[int, int], text_tokens: int, level: float):
    """Relative L2 from fp32 of one bf16 forward: ours, and ComfyUI's own Lens on the same weights."""
    ours = load_denoiser(full_models / "diffusion_models" / DENOISER, torch.bfloat16).cuda()
    latents = torch.randn(1, grid[0] * grid[1], 128, generator=generator, device="cuda").bfloat16()
    text = torch.randn(1, text_tokens, 4, 2880, generator=generator, device="cuda").bfloat16()
    sigma = torch.tensor([level], device="cuda")
    low = ours(latents, sigma, text, grid)
    theirs = comfyui_lens(ours.state_dict())
    image = latents.transpose(1, 2).unflatten(-1, grid)
    mask = torch.ones(1, text_tokens, device="cuda")
    native = theirs(image, sigma, text.flatten(2), mask).flatten(2).transpose(1, 2)
    exact = copy.deepcopy(ours).float()(latents.float(), sigma, text.float(), grid)
    offsets = relative_l2(low, exact), relative_l2(native, exact)
    print(f"{grid} S={text_tokens} sigma={level}: ours {offsets[0]:.2e}, ComfyUI {offsets[1]:.2e}")
    assert torch.isfinite(low).all()
    return offsets


@pytest.mark.parametrize("grid", [(64, 64), (90, 90), (46, 92)], ids=["1024", "1440", "1472x736"])
@pytest.mark.parametrize("text_tokens", [0, 200])
def test_bf16_rounds_no_worse_than_comfyui(full_models: Path, generator, grid, text_tokens):
    """At 0.5, where 1000 sigma is exact in bf16, so that only the layers round."""
    ours, theirs = bf16_offsets(full_models, generator, grid, text_tokens, 0.5)
    # The same arithmetic in another order: equal but for the luck of rounding.
    assert ours < 1.1 * theirs


def test_only_comfyui_rounds_a_thousand_sigma(full_models: Path, generator):
    """At 0.8125, exact in bf16, 1000 sigma is not: ComfyUI's sinusoid sees 812 where the reference's and
    ours see 812.5. The bounds lie far from both figures (0.019 and 0.15 measured)."""
    ours, theirs = bf16_offsets(full_models, generator, (64, 64), 200, 0.8125)
    assert ours < 0.04 < 0.08 < theirs


@pytest.mark.parametrize(
    "arguments",
    [(), ("--disable-dynamic-vram",), ("--reserve-vram", "132")],
    ids=["dynamic", "classic", "8 GB left"],
)
def test_server_draws_at_full_size(full_models: Path, tmp_path: Path, arguments: tuple[str, ...]):
    """The Turbo example as a user runs it, at 1024: twice, so that models are reloaded and reused."""
    front_end = tmp_path / "front_end"
    front_end.mkdir()
    (front_end / "index.html").write_text("<html></html>")
    workflow = json.loads((PACK / "example_workflows" / "Lens Turbo - 4 steps.json").read_text())
    arguments = ("--front-end-root", str(front_end), *arguments)
    with ComfyServer(tmp_path / "comfy", full_models, arguments) as server:
        prompt = to_prompt(workflow, server.get("/api/object_info"))
        set_input(prompt, "LensEncoderLoader", encoder_name=ENCODER)
        pictures = []
        for seed, text in ((1, "a red kite over a beach"), (2, "a blue door in a white wall")):
            set_input(prompt, "LensSampler", seed=seed)
            set_input(prompt, "LensTextEncode", prompt=text)
            entry = server.wait(server.queue(prompt, workflow))
            assert error_of(entry) is None, str(error_of(entry))
            pictures += [np.asarray(Image.open(path)) for path in server.images(entry)]
        print(server.log.read_text(errors="replace")[-6000:])
        print(json.dumps(server.get("/api/system_stats")["devices"], indent=1))
    assert [picture.shape for picture in pictures] == [(832, 1248, 3)] * 2
    assert not np.array_equal(*pictures)
    assert all(picture.std() > 5 for picture in pictures), "a flat picture"
