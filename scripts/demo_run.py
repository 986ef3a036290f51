"""What scripts/demo does once its environment stands."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from lens_core.tiny.layouts import write_everything
from scripts.comfy_server import PACK, ComfyServer, error_of
from scripts.workflow import set_input, to_prompt

WORKFLOW = PACK / "example_workflows" / "Lens Turbo - 4 steps.json"
# The tiny stand-ins for the files that the workflow names.
TINY = {
    "LensModelLoader": {"model_name": "lens_turbo_tiny_bf16.safetensors"},
    "LensEncoderLoader": {"encoder_name": "gpt_oss_tiny_mxfp4.safetensors"},
    "LensVAELoader": {"vae_name": "flux2_tiny_vae.safetensors"},
    "LensLoraLoader": {"lora_name": "lens_tiny_lora.safetensors"},
}


def main() -> int:
    """Run the workflow; prints the picture's path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for server, models and pictures")
    args = parser.parse_args()
    base = args.keep or Path(tempfile.mkdtemp(prefix="lens-demo-"))
    models = base / "tiny_models"
    if not models.exists():
        print("Writing tiny random models ...")
        write_everything(models, seed=0)
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    print("Starting ComfyUI ...")
    with ComfyServer(base / "comfy", models) as server:
        prompt = to_prompt(workflow, server.get("/api/object_info"))
        for node, values in TINY.items():
            set_input(prompt, node, **values)
        print(f"Running {WORKFLOW.stem!r} on {server.url} ...")
        entry = server.wait(server.queue(prompt, workflow))
        error = error_of(entry)
        if error:
            print(f"{error['node_type']}: {error['exception_message']}", file=sys.stderr)
            return 1
        for path in server.images(entry):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
