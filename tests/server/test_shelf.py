"""Checkpoints swapped on a real server: back from RAM with ComfyUI's own caching, gone after /free."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scripts.comfy_server import ComfyServer
from tests.quantized_session import Session

SERVED = "Lens: lens_turbo_tiny_bf16 is still in RAM: not read again."
TURBO, LENS = "lens_turbo_tiny_bf16.safetensors", "lens_tiny_bf16.safetensors"


@pytest.mark.parametrize("mode", ["none", "int8_dynamic"])
def test_turbo_rl_turbo(server: ComfyServer, picture_prompt: Callable[..., dict[str, Any]], mode: str):
    session = Session(server, picture_prompt(model__model_name=TURBO))
    served = SERVED if mode == "none" else SERVED.replace(" is", f" ({mode}) is", 1)
    server.free()
    log = _Log(server)
    first = session.draw(mode)
    # Another size too: nodes before the loader run, and ComfyUI forgets the MODEL after the first of them.
    session.prompt["size"]["inputs"]["aspect_ratio"] = "3:2"
    other = session.draw(mode, model_name=LENS)
    assert served not in log.new()
    session.prompt["size"]["inputs"]["aspect_ratio"] = "1:1"
    again = session.draw(mode)
    said = log.new()
    assert served in said
    assert "memory leak" not in said
    assert np.array_equal(again, first) and other.shape != first.shape
    server.free()
    time.sleep(1)
    assert np.array_equal(session.draw(mode), first)
    assert "still in RAM" not in log.new()


class _Log:
    """What the server has said since the last look."""

    def __init__(self, server: ComfyServer) -> None:
        self.server, self.seen = server, 0
        self.new()

    def new(self) -> str:
        text = self.server.log.read_text(errors="replace")
        start, self.seen = self.seen, len(text)
        return text[start:]
