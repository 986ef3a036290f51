"""A real ComfyUI in this process, on the CPU, with the pack loaded by ComfyUI's own loader."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACK = Path(__file__).parents[2]


@dataclass
class Host:
    """Node classes by id, and the pack's modules as ComfyUI imported them."""

    node_classes: dict[str, Any]
    pack_name: str

    def module(self, name: str) -> ModuleType:
        """A module of the pack, e.g. ``nodes.host.model`` (not the same object as a test's own import)."""
        return sys.modules[f"{self.pack_name}.{name}"]

    def run(self, node_id: str, **inputs: Any) -> tuple:
        """Execute a node, V3 or V1; returns its outputs."""
        node = self.node_classes[node_id]
        if hasattr(node, "GET_SCHEMA"):
            result = node.execute(**inputs)
            return tuple(result.result) if hasattr(result, "result") else tuple(result)
        return tuple(getattr(node(), node.FUNCTION)(**inputs))


@pytest.fixture(scope="session")
def host(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """ComfyUI from COMFYUI_PATH with its models folder set to the tiny models."""
    comfyui = os.environ["COMFYUI_PATH"]
    sys.path.insert(0, comfyui)
    from comfy import cli_args

    cli_args.args.cpu = True
    import folder_paths

    base = tmp_path_factory.mktemp("comfy")
    folder_paths.models_dir = str(tiny_models)
    for key in ("diffusion_models", "text_encoders", "vae", "loras", "vae_approx"):
        (tiny_models / key).mkdir(exist_ok=True)
        folder_paths.folder_names_and_paths[key][0].insert(0, str(tiny_models / key))
    for set_folder, name in (
        (folder_paths.set_output_directory, "output"),
        (folder_paths.set_temp_directory, "temp"),
        (folder_paths.set_input_directory, "input"),
    ):
        (base / name).mkdir()
        set_folder(str(base / name))
    import nodes

    link = base / "ComfyUI-Lens"
    link.symlink_to(PACK)
    loaded = asyncio.run(_load(nodes, link))
    assert loaded, "ComfyUI could not load the pack; see the log"
    return Host(nodes.NODE_CLASS_MAPPINGS, str(link).replace(".", "_x_"))


async def _load(nodes: ModuleType, pack: Path) -> bool:
    extras = Path(nodes.__file__).parent / "comfy_extras"
    for name in ("nodes_custom_sampler", "nodes_flux", "nodes_model_advanced", "nodes_cfg"):
        await nodes.load_custom_node(str(extras / f"{name}.py"), module_parent="comfy_extras")
    return await nodes.load_custom_node(str(pack))


@pytest.fixture
def load_tiny(host: Host) -> Callable[[], tuple[Any, Any, Any]]:
    """Loads fresh (MODEL, CLIP, VAE) of the tiny models through our loaders, in fp32."""

    def load() -> tuple[Any, Any, Any]:
        model, *_ = host.run("LensModelLoader", model_name="Lens-tiny", dtype="float32")
        (clip,) = host.run("LensEncoderLoader", encoder_name="gpt_oss_tiny_mxfp4.safetensors")
        (vae,) = host.run("LensVAELoader", vae_name="flux2_tiny_vae.safetensors")
        return model, clip, vae

    return load
