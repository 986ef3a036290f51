"""Out of memory in a running server: once, and the picture is the same; always, and one error names settings.

Memory runs out in calls of ours that another node of the server makes fail (see ``shortage_node``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from scripts.comfy_server import ComfyServer, error_of

PLACES = {
    "LensModelLoader": "lens_core.denoiser_file:DenoiserFile:load",
    "LensTextEncode": "lens_core.encoder.gpt_oss:GptOssLayer:forward",
    "LensSampler": "nodes.host.denoiser:HostDenoiser:_forward",
    "LensVAEDecode": "lens_core.vae:LensVAE:decode",
}
SETTINGS = {
    "LensModelLoader": "quantised already",
    "LensTextEncode": "LensEncoderLoader's placement 'cpu'",
    "LensSampler": "int8_dynamic or uint4_sdnq",
    "LensVAEDecode": "VAE Decode (Tiled)",
}
SAID = "tried once more with less"


@pytest.fixture
def shorten(server: ComfyServer) -> Iterator[Callable[[str, int], None]]:
    def run(node: str, times: int) -> None:
        prompt = {"1": {"class_type": "Shortage", "inputs": {"place": PLACES[node], "times": times}}}
        assert error_of(server.wait(server.queue(prompt))) is None

    yield run
    for node in PLACES:
        run(node, 0)


@pytest.fixture
def entry(server: ComfyServer, picture_prompt: Callable[..., dict]) -> Callable[[], dict]:
    """Draws the same picture anew, with nothing kept from before."""

    def run() -> dict:
        server.post("/api/free", {"unload_models": True, "free_memory": True})
        prompt = picture_prompt(encoder__feature_cache=False)
        small = {"width": 128, "height": 128, "batch_size": 1}
        prompt["size"] = {"class_type": "EmptyFlux2LatentImage", "inputs": small}
        return server.wait(server.queue(prompt))

    return run


def picture(server: ComfyServer, entry: dict) -> np.ndarray:
    assert error_of(entry) is None
    (path,) = server.images(entry)
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Those that went well."""
    return []


@pytest.mark.parametrize("node", PLACES)
def test_out_of_memory(server: ComfyServer, shorten: Callable, entry: Callable, pictures: list, node: str):
    if not pictures:
        pictures.append(picture(server, entry()))
    want = pictures[0]
    before = server.log.read_text(errors="replace").count(SAID)
    shorten(node, 1)
    assert np.array_equal(picture(server, entry()), want)
    assert server.log.read_text(errors="replace").count(SAID) == before + 1
    shorten(node, 1000)
    error = error_of(entry())
    assert error is not None and error["node_type"] == node
    assert error["exception_type"].endswith("OutOfMemory")
    message = error["exception_message"]
    assert message.startswith("CUDA out of memory while") and SETTINGS[node] in message
    assert "GB are needed" in message and "GB are free" in message
    assert "you ran out of memory on your GPU" in message, "ComfyUI's own tip"
    shorten(node, 0)
    assert np.array_equal(picture(server, entry()), want)
