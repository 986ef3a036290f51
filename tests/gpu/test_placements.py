"""Real servers at full size under ComfyUI's start flags for memory, and on several GPUs: one picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.comfy_server import ComfyServer, error_of

MODELS = {
    "model__model_name": "lens_turbo_bf16.safetensors",
    "encoder__encoder_name": "gpt_oss_20b_mxfp4.safetensors",
    "vae__vae_name": "flux2-vae.safetensors",
}


@pytest.fixture
def draw(full_models: Path, tmp_path: Path, picture_prompt: Any) -> Callable[..., list[np.ndarray]]:
    """Pictures by a server of its own; ``change`` edits the prompt of all but the first, ``settings`` are
    the sampler's."""

    def run(
        *arguments: str, change: Callable[[dict[str, Any]], None] | None = None, **settings: float
    ) -> list[np.ndarray]:
        front_end = tmp_path / "front_end"
        front_end.mkdir(exist_ok=True)
        (front_end / "index.html").write_text("<html></html>")
        flags = ("--front-end-root", str(front_end), *arguments)
        pictures = []
        with ComfyServer(tmp_path / "-".join(("comfy", *arguments)), full_models, flags) as server:
            for number in range(2):
                prompt = picture_prompt(**MODELS)
                prompt["sampler"]["inputs"] |= {"cfg": 5.0, **settings}
                if number and change is not None:
                    change(prompt)
                entry = server.wait(server.queue(prompt))
                assert error_of(entry) is None, str(error_of(entry))
                (path,) = server.images(entry)
                pictures.append(np.asarray(Image.open(path)).astype(np.int16))
            log = server.log.read_text(errors="replace").partition("got prompt")[2]
        print(log[-3000:])
        assert "Traceback" not in log and "Out of memory" not in log
        return pictures

    return run


@pytest.mark.gpu
def test_start_flags_do_not_change_the_picture(draw):
    (want, again) = draw()
    assert np.array_equal(want, again) and want.std() > 5
    for arguments in (("--novram", "--disable-dynamic-vram"), ("--lowvram",), ("--reserve-vram", "134")):
        for picture in draw(*arguments):
            assert np.array_equal(picture, want), arguments


@pytest.mark.two_gpus
@pytest.mark.parametrize("settings", [{}, {"cfg": 1.0, "nag_scale": 4.0}], ids=["guidance", "NAG"])
def test_prompt_and_negative_on_two_gpus(draw, settings: dict[str, float]):
    """ComfyUI's MultiGPU node evaluates them at the same time, each on its GPU; with NAG one evaluation
    takes both. The same picture."""

    def split(prompt: dict[str, Any]) -> None:
        model = prompt["sampler"]["inputs"]["model"]
        inputs = {"model": model, "max_gpus": 2}
        prompt["split"] = {"class_type": "MultiGPU_WorkUnits", "inputs": inputs}
        prompt["sampler"]["inputs"]["model"] = ["split", 0]

    alone, together = draw(change=split, **settings)
    assert np.array_equal(alone, together)
