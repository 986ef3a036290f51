"""A model quantised by the node over HTTP: written once, listed, drawn with, and written again if deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from scripts.comfy_server import ComfyServer, error_of

NAME = "small.safetensors"


@pytest.fixture
def quantize(server: ComfyServer) -> Callable[..., dict[str, Any] | None]:
    """Runs the node alone; returns its error, if any."""

    def run(**changes: Any) -> dict[str, Any] | None:
        inputs = {
            "model_name": "Lens-Turbo-tiny",
            "quantization": "int8_dynamic",
            "file_name": "small",
            "overwrite": False,
        }
        prompt = {"q": {"class_type": "LensQuantizeModel", "inputs": {**inputs, **changes}}}
        return error_of(server.wait(server.queue(prompt)))

    return run


def test_write_list_draw_delete_and_write_again(
    server: ComfyServer, quantize: Callable[..., Any], picture_prompt: Callable[..., dict[str, Any]]
):
    path = server.models / "diffusion_models" / NAME
    assert quantize() is None
    content = path.read_bytes()
    for loader in ("LensModelLoader", "UNETLoader"):
        inputs = server.get(f"/api/object_info/{loader}")[loader]["input"]["required"]
        assert NAME in str(next(iter(inputs.values())))
    entry = server.wait(server.queue(picture_prompt(model__model_name=NAME)))
    assert error_of(entry) is None and len(server.images(entry)) == 1
    assert quantize() is None, "it is there already"
    path.unlink()
    assert quantize() is None
    assert path.read_bytes() == content


def test_a_bad_name_is_one_sentence(quantize: Callable[..., Any]):
    error = quantize(file_name="../../outside")
    assert error["exception_type"].endswith("SettingError")
    assert "'../../outside.safetensors' is none below" in error["exception_message"]
