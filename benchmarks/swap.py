"""Swapping checkpoints in a real ComfyUI: the first time, and back to one that was used before.

    COMFYUI_PATH=... python benchmarks/swap.py [--out FOLDER] [--folder SCRATCH]

Full-size random weights; two files, 512 x 512, 4 steps. Seconds from a prompt's start to its end, the same
prompt and seed each time, so that only the loader, the sampler and the decoder run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, write
from benchmarks.models import ENCODER, VAE, write_models
from scripts.comfy_server import ComfyServer, error_of

FILES = ("lens_turbo_bf16.safetensors", "lens_bf16.safetensors")
MODES = ("none", "int8_dynamic", "uint4_sdnq")


def prompt_of(name: str, mode: str) -> dict[str, Any]:
    """An API prompt with a checkpoint in a mode."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "model": ("LensModelLoader", {"model_name": name, "dtype": "auto", "quantization": mode}),
        "encoder": ("LensEncoderLoader", {"encoder_name": ENCODER}),
        "vae": ("LensVAELoader", {"vae_name": VAE}),
        "text": ("LensTextEncode", {"clip": ["encoder", 0], "prompt": "a circle", "negative": ""}),
        "size": ("LensEmptyLatent", {"base_resolution": "512", "aspect_ratio": "1:1", "batch_size": 1}),
        "sampler": (
            "LensSampler",
            {
                **{"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1]},
                **{"latent": ["size", 0], "seed": 1, "steps": 4, "cfg": 1.0, "noise": "host", "denoise": 1.0},
            },
        ),
        "decode": ("LensVAEDecode", {"latent": ["sampler", 0], "vae": ["vae", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "swap"}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def seconds(server: ComfyServer, name: str, mode: str) -> float:
    """From the start to the end of a prompt, as ComfyUI's own history has them."""
    entry = server.wait(server.queue(prompt_of(name, mode)))
    if error_of(entry) is not None:
        raise SystemExit(f"{name}, {mode}: {error_of(entry)}")
    times = {kind: detail["timestamp"] for kind, detail in entry["status"]["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1e3


def measure(server: ComfyServer, mode: str) -> dict[str, Any]:
    """First pictures of both files, then swaps back."""
    turbo, lens = FILES
    first = {name: seconds(server, name, mode) for name in (turbo, lens)}
    return {
        "first, s": first[lens],
        "back, s": [seconds(server, name, mode) for name in (turbo, lens, turbo, lens)],
        "lines of the log": server.log.read_text(errors="replace").count("is still in RAM"),
    }


def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for swap.json and swap.md")
    parser.add_argument("--folder", type=Path, default=None, help="where 22 GB can lie for a while")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        models = Path(scratch) / "models"
        folders = [models / kind for kind in ("diffusion_models", "text_encoders", "vae")]
        for folder in folders:
            folder.mkdir(parents=True)
        write_models(*folders, FILES[0])
        os.link(*(folders[0] / name for name in FILES))
        page = Path(scratch) / "page"
        page.mkdir()
        (page / "index.html").write_text("<html></html>", encoding="utf-8")
        with ComfyServer(Path(scratch) / "comfy", models, ("--front-end-root", str(page))) as server:
            for mode in MODES:
                results[mode] = measure(server, mode)
                print(mode, results[mode], flush=True)
    rows = [["quantization", "first picture with the other checkpoint, s", "back, s"]]
    for mode, result in results.items():
        rows.append([mode, f"{result['first, s']:.1f}", ", ".join(f"{one:.1f}" for one in result["back, s"])])
    write("swap", args.out, results, rows)


if __name__ == "__main__":
    main()
