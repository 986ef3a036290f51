"""Every mode of the selector at full size in one session of a real server: nothing stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lens_core.quant.policy import MODES
from scripts.comfy_server import ComfyServer
from tests.quantized_session import LORA, Session, write_lora

pytestmark = pytest.mark.gpu
ENCODER = "gpt_oss_20b_mxfp4.safetensors"
SIZES = {
    f"transformer_blocks.{block}.{layer}": size
    for block in range(0, 48, 4)
    for layer, size in (("attn.img_qkv", (4608, 1536)), ("img_mlp.w2", (1536, 4096)))
}
# What CUDA and its libraries take for themselves as new kernels are loaded.
OWN = 300_000_000


@pytest.mark.parametrize(
    "arguments", [(), ("--disable-dynamic-vram",)], ids=["dynamic VRAM", "without dynamic VRAM"]
)
def test_all_modes(full_models: Path, tmp_path: Path, picture_prompt: Any, arguments: tuple[str, ...]):
    """One server, one mode after the other; the GPU's free memory is the same after each."""
    (tmp_path / "front_end").mkdir()
    (tmp_path / "front_end" / "index.html").write_text("<html></html>")
    write_lora(full_models / "loras" / LORA, SIZES, share=0.5)
    prompt = picture_prompt(
        model__model_name="lens_turbo_bf16.safetensors",
        encoder__encoder_name=ENCODER,
        vae__vae_name="flux2-vae.safetensors",
    )
    front_end = ("--front-end-root", str(tmp_path / "front_end"))
    free: dict[str, list[int]] = {}
    with ComfyServer(tmp_path / "comfy", full_models, (*front_end, *arguments)) as server:
        session = Session(server, prompt)
        for mode in MODES:
            free[mode] = session.check(mode)
            print(mode, [f"{there / 1e9:.3f} GB free" for there in free[mode]], flush=True)
        # Before the first prompt ComfyUI tells of extra nodes whose packages are not installed.
        log = server.log.read_text(errors="replace").partition("got prompt")[2]
    print(log[-4000:])
    every = [there for pair in free.values() for there in pair]
    assert max(every) - min(every) < OWN
    assert "Traceback" not in log
