"""LensDoctor on a real server, its report shown by ComfyUI's own text node."""

from __future__ import annotations

from scripts.comfy_server import ComfyServer, error_of


def test_a_report_over_http(server: ComfyServer):
    prompt = {
        "doctor": {"class_type": "LensDoctor", "inputs": {"files": "all", "hash": False, "parity": False}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["doctor", 0]}},
    }
    entry = server.wait(server.queue(prompt))
    assert error_of(entry) is None
    (text,) = entry["outputs"]["show"]["text"]
    assert "--cpu" in text and "Fast paths on CPU" in text
    assert "lens_turbo_tiny_bf16.safetensors" in text
    assert str(server.base) not in text and str(server.models) not in text
