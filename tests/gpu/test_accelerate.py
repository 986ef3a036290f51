"""CUDA graphs on a real server, with dynamic VRAM, by each of its memory allocators."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.comfy_server import PACK, ComfyServer, error_of
from scripts.workflow import set_input, to_prompt

pytestmark = pytest.mark.gpu
DENOISER, ENCODER = "lens_turbo_bf16.safetensors", "gpt_oss_20b_mxfp4.safetensors"
LINE = re.compile(r"Lens: CUDA graphs: (\d+) of (\d+) forwards played, (\d+) recorded\.")


OWN_ALLOCATOR = ("--disable-cuda-malloc",)


@pytest.fixture(params=[OWN_ALLOCATOR], ids=["PyTorch's allocator"])
def server(request, full_models: Path, tmp_path: Path) -> Iterator[ComfyServer]:
    front_end = tmp_path / "front_end"
    front_end.mkdir()
    (front_end / "index.html").write_text("<html></html>")
    arguments = ("--front-end-root", str(front_end), *request.param)
    with ComfyServer(tmp_path / "comfy", full_models, arguments) as running:
        yield running


@pytest.fixture
def draw(server: ComfyServer) -> Callable[..., np.ndarray]:
    """The Turbo example, its model through the node if ``graphs`` is given."""
    workflow = json.loads((PACK / "example_workflows" / "Lens Turbo - 4 steps.json").read_text())
    info = server.get("/api/object_info")

    def run(seed: int, graphs: bool | None = None, **size: Any) -> np.ndarray:
        prompt = to_prompt(workflow, info)
        set_input(prompt, "LensEncoderLoader", encoder_name=ENCODER)
        set_input(prompt, "LensModelLoader", model_name=DENOISER)
        set_input(prompt, "LensSampler", seed=seed)
        set_input(prompt, "LensEmptyLatent", **size)
        if graphs is not None:
            (sampler,) = (node for node in prompt.values() if node["class_type"] == "LensSampler")
            inputs = {"model": sampler["inputs"]["model"], "cuda_graphs": graphs, "attention": "auto"}
            prompt["accelerate"] = {"class_type": "LensAccelerate", "inputs": inputs}
            sampler["inputs"]["model"] = ["accelerate", 0]
        entry = server.wait(server.queue(prompt))
        assert error_of(entry) is None, str(error_of(entry))
        (path,) = server.images(entry)
        return np.asarray(Image.open(path)).astype(int)

    return run


def played(server: ComfyServer) -> list[tuple[int, ...]]:
    """(played, of, recorded) of every run with graphs, from the log."""
    return [tuple(map(int, found)) for found in LINE.findall(server.log.read_text(errors="replace"))]


def free_after_unloading(server: ComfyServer) -> int:
    """Bytes free on the GPU once ComfyUI has unloaded all models; what nodes returned stays cached.

    That happens after the answer, and weights outside dynamic VRAM are copied to RAM: as long as more memory
    becomes free within three seconds, it goes on.
    """
    body, kind = json.dumps({"unload_models": True}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + "/api/free", body, kind, method="POST")
    urllib.request.urlopen(request, timeout=30)
    seen = [0]
    while len(seen) < 5 or seen[-1] > seen[-4]:
        time.sleep(1)
        seen.append(server.get("/api/system_stats")["devices"][0]["vram_free"])
    return seen[-1]


def test_graphs_draw_the_same_and_give_their_memory_back(server: ComfyServer, draw):
    """Two sizes; each is recorded in its second step, and played from then on."""
    want = draw(1), draw(2, base_resolution="512")
    free = free_after_unloading(server)
    got = draw(1, graphs=True), draw(2, graphs=True, base_resolution="512")
    again = draw(3, graphs=True)
    assert played(server) == [(3, 4, 1), (3, 4, 1), (4, 4, 0)]
    for mine, plain in zip(got, want, strict=True):
        assert np.array_equal(mine, plain), f"up to {abs(mine - plain).max()} apart"
    assert not np.array_equal(again, got[0])
    left = free_after_unloading(server)
    print(f"{free / 1e9:.2f} GB free before the first graph, {left / 1e9:.2f} GB after the last")
    assert left > free - (300 << 20)
    # Another seed: with RAM enough ComfyUI would have kept the picture of an earlier one, and drawn nothing.
    after = draw(4, graphs=True)
    assert played(server)[-1] == (3, 4, 1), "not recorded anew"
    assert np.array_equal(after, draw(4))


@pytest.mark.parametrize("server", [()], ids=["ComfyUI's default"], indirect=True)
def test_the_asynchronous_allocator_draws_without(server: ComfyServer, draw):
    """Memory that is part of a graph: Triton would refuse it, and freeing it could end the server."""
    assert np.array_equal(draw(1, graphs=True), draw(1))
    log = server.log.read_text(errors="replace")
    assert "cudaMallocAsync" in log and "start it with --disable-cuda-malloc" in log and not played(server)
