"""What scripts/demo does once its environment stands."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lens_core.tiny.layouts import write_everything
from scripts.comfy_server import PACK, ComfyServer, error_of
from scripts.gallery import SHOTS, write_sheet
from scripts.workflow import set_input, to_prompt

TINY_WORKFLOW = PACK / "example_workflows" / "Lens Turbo - 4 steps.json"
# The tiny stand-ins for the files that the workflow names.
TINY = {
    "LensModelLoader": {"model_name": "lens_turbo_tiny_bf16.safetensors"},
    "LensEncoderLoader": {"encoder_name": "gpt_oss_tiny_mxfp4.safetensors"},
    "LensVAELoader": {"vae_name": "flux2_tiny_vae.safetensors"},
    "LensLoraLoader": {"lora_name": "lens_tiny_lora.safetensors"},
    "LensGrid": {
        "checkpoint_1": "lens_turbo_tiny_bf16.safetensors",
        "checkpoint_2": "lens_tiny_bf16.safetensors",
    },
}
# Beside the other examples once checkpoints/nano is there.
NANO_WORKFLOW = PACK / "tools" / "nano" / "Lens nano - 256.json"
NANO = PACK / "checkpoints" / "nano"


class Failed(Exception):
    """A node's error, in one line."""


def main() -> int:
    """Draw the gallery, or the tiny models' picture; prints where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for server, models and pictures")
    parser.add_argument("--tiny", action="store_true", help="tiny random models: one picture, of noise")
    args = parser.parse_args()
    base = args.keep or Path(tempfile.mkdtemp(prefix="lens-demo-"))
    tiny = args.tiny or not NANO.is_dir()
    if tiny and not args.tiny:
        print("checkpoints/nano is not in this copy, so the models are tiny random ones and draw noise.")
    models = base / ("tiny_models" if tiny else "models")
    if tiny and not models.exists():
        print("Writing tiny random models ...")
        write_everything(models, seed=0)
    print("Starting ComfyUI ...")
    with ComfyServer(base / "comfy", models) as server:
        try:
            path = draw_tiny(server) if tiny else draw_gallery(server, base / "gallery.png")
        except Failed as error:
            print(error, file=sys.stderr)
            return 1
    print(path)
    return 0


def draw_tiny(server: ComfyServer) -> Path:
    """Run the Turbo workflow with the tiny models; returns its picture."""
    print(f"Running {TINY_WORKFLOW.stem!r} on {server.url} ...")
    return _drawn(server, TINY_WORKFLOW, TINY)


def draw_gallery(server: ComfyServer, target: Path) -> Path:
    """Run the nano workflow for each of ``SHOTS``; returns the sheet of them."""
    print(f"Running {NANO_WORKFLOW.stem!r} on {server.url} ...")
    pictures = []
    for shot in SHOTS:
        print(f"  {shot.model:15}  {shot.prompt}")
        values = {
            "LensModelLoader": {"model_name": shot.model},
            "LensTextEncode": {"prompt": shot.prompt},
            "LensEmptyLatent": {"aspect_ratio": shot.aspect_ratio},
            "LensSampler": {"seed": shot.seed},
        }
        pictures.append(_drawn(server, NANO_WORKFLOW, values))
    write_sheet(SHOTS, pictures, target)
    return target


def _drawn(server: ComfyServer, file: Path, values: dict[str, dict[str, Any]]) -> Path:
    """The picture of a workflow with inputs of some node types replaced; raises Failed."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, server.get("/api/object_info"))
    for node, inputs in values.items():
        set_input(prompt, node, **inputs)
    entry = server.wait(server.queue(prompt, workflow))
    error = error_of(entry)
    if error:
        raise Failed(f"{error['node_type']}: {error['exception_message']}")
    (path,) = server.images(entry)
    return path


if __name__ == "__main__":
    sys.exit(main())
