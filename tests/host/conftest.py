"""A real ComfyUI in this process, on the CPU, with the pack loaded by ComfyUI's own loader."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PACK = Path(__file__).parents[2]
PROMPT = "a red circle"


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


@dataclass
class Tiny:
    """The tiny models behind our loaders, and the conditioning of one prompt and a blank negative.

    Shared by all tests of a session: patch a ``model.clone()``, never the model itself.
    """

    model: Any
    clip: Any
    vae: Any
    positive: list
    negative: list


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
        (folder_paths.set_user_directory, "user"),
    ):
        (base / name).mkdir()
        set_folder(str(base / name))
    import nodes

    link = base / "ComfyUI-Lens"
    link.symlink_to(PACK)
    loaded = asyncio.run(_load(nodes, link))
    assert loaded, "ComfyUI could not load the pack; see the log"
    gc.collect()
    gc.freeze()  # ComfyUI's modules stay too: see tests/conftest.py
    return Host(nodes.NODE_CLASS_MAPPINGS, str(link).replace(".", "_x_"))


async def _load(nodes: ModuleType, pack: Path) -> bool:
    extras = Path(nodes.__file__).parent / "comfy_extras"
    for name in ("nodes_custom_sampler", "nodes_flux", "nodes_model_advanced", "nodes_cfg"):
        await nodes.load_custom_node(str(extras / f"{name}.py"), module_parent="comfy_extras")
    return await nodes.load_custom_node(str(pack))


@pytest.fixture(autouse=True)
def _nothing_on_the_shelf(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests change weights in place: none may be given what another one loaded."""
    monkeypatch.setattr(host.module("nodes.host.shelf"), "_living", weakref.WeakSet())


@pytest.fixture(scope="session")
def own_models(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second models folder that ComfyUI searches: tests of this worker may write into it."""
    import folder_paths

    root = tmp_path_factory.mktemp("own_models")
    for key in ("diffusion_models", "text_encoders", "vae", "loras", "lens"):
        (root / key).mkdir()
        folder_paths.add_model_folder_path(key, str(root / key))
    return root


def _load_tiny(host: Host) -> tuple[Any, Any, Any]:
    model, *_ = host.run("LensModelLoader", model_name="Lens-tiny", dtype="float32")
    (clip,) = host.run(
        "LensEncoderLoader", encoder_name="gpt_oss_tiny_mxfp4.safetensors", feature_cache=False
    )
    (vae,) = host.run("LensVAELoader", vae_name="flux2_tiny_vae.safetensors")
    return model, clip, vae


@pytest.fixture
def load_tiny(host: Host) -> Callable[[], tuple[Any, Any, Any]]:
    """Loads fresh (MODEL, CLIP, VAE) of the tiny models through our loaders, in fp32."""
    return lambda: _load_tiny(host)


@pytest.fixture(scope="session")
def tiny(host: Host) -> Tiny:
    """The tiny models, loaded once."""
    with torch.inference_mode():
        model, clip, vae = _load_tiny(host)
        positive, negative = host.run("LensTextEncode", clip=clip, prompt=PROMPT, negative="")
    return Tiny(model, clip, vae, positive, negative)


@pytest.fixture(scope="session")
def draw(host: Host, tiny: Tiny) -> Callable[..., dict[str, Any]]:
    """LensSampler on a small empty latent, two steps at cfg 5; keyword arguments replace or add inputs."""

    def run(**changes: Any) -> dict[str, Any]:
        inputs = {
            "model": tiny.model,
            "positive": tiny.positive,
            "negative": tiny.negative,
            "latent": {"samples": torch.zeros(1, 128, 6, 4)},
            "seed": 1,
            "steps": 2,
            "cfg": 5.0,
            "noise": "host",
            "denoise": 1.0,
        }
        assert changes.keys() <= {
            *inputs,
            *("guidance_start", "guidance_end", "denoise_by", "custom_noise"),
            *("nag_scale", "nag_tau", "nag_alpha"),
        }
        (latent,) = host.run("LensSampler", **{**inputs, **changes})
        return latent

    return run


@pytest.fixture
def ksampler(host: Host, tiny: Tiny) -> Callable[..., torch.Tensor]:
    """ComfyUI's KSampler on the same latent, two steps of Euler at cfg 5; arguments replace inputs."""

    def run(model: Any = tiny.model, **changes: Any) -> torch.Tensor:
        inputs = {
            "seed": 1,
            "steps": 2,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": tiny.positive,
            "negative": tiny.negative,
            "latent_image": {"samples": torch.zeros(1, 128, 6, 4)},
            "denoise": 1.0,
        }
        (latent,) = host.run("KSampler", model=model, **{**inputs, **changes})
        return latent["samples"]

    return run


@pytest.fixture(scope="session")
def stock_lens(host: Host, tiny_folder: Path) -> Callable[..., Any]:
    """Builds ComfyUI's own Lens network with the tiny fp32 weights and the reference's q/k epsilon."""
    from tests.host.helpers import stock_network

    return lambda **changes: stock_network(tiny_folder, **changes)


@pytest.fixture
def said(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page is told of the node 7."""
    from server import PromptServer

    lines: list[str] = []

    class Page:
        def send_progress_text(self, text, node_id, sid=None) -> None:
            assert node_id == "7"
            lines.append(text)

    monkeypatch.setattr(PromptServer, "instance", Page(), raising=False)
    return lines


@pytest.fixture
def progress(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, Any]]]:
    """Everything that progress bars report during the test: (done, total, preview)."""
    import comfy.utils

    # By default a bar reports at most every tenth of a second, and every half per cent.
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0)

    seen: list[tuple[int, int, Any]] = []

    def hook(done: int, total: int, preview: Any, node_id: Any = None) -> None:
        seen.append((done, total, preview))

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    yield seen
    comfy.utils.set_progress_bar_global_hook(before)


@pytest.fixture(scope="session")
def stock_model(host: Host, own_models: Path, tiny_folder: Path) -> Any:
    """A MODEL from UNETLoader: ComfyUI's own Lens, the same fp32 weights, the reference's epsilon."""
    from safetensors.torch import save_file

    from tests.host.helpers import align_qk_eps, fp32_weights

    name = "lens_stock_fp32.safetensors"
    save_file(fp32_weights(tiny_folder), own_models / "diffusion_models" / name)
    (model,) = host.run("UNETLoader", unet_name=name, weight_dtype="default")
    assert model.model_dtype() == torch.float32
    align_qk_eps(model.model.diffusion_model)
    return model


def load_stock_clip(weights: dict[str, Any]) -> Any:
    """ComfyUI's own Lens CLIP with the tiny sizes, computing in fp32."""
    import comfy.sd

    from lens_core.prompt import PromptTokenizer
    from lens_core.tiny import models
    from lens_core.tiny.tokenizer import tiny_tokenizer

    config = models.encoder_config(tiny_tokenizer().get_vocab_size())
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_local_experts",
    )
    return comfy.sd.load_text_encoder_state_dicts(
        [weights],
        clip_type=comfy.sd.CLIPType.LENS,
        model_options={
            "dtype": torch.float32,
            "gpt_oss_config": {name: getattr(config, name) for name in sizes},
            "txt_offset": len(PromptTokenizer(tiny_tokenizer()).prefix),
        },
    )


@pytest.fixture(scope="session")
def stock_clip(host: Host, tiny_models: Path) -> Any:
    """ComfyUI's own Lens CLIP with the tiny weights, dequantised."""
    from tests.host.helpers import comfyui_weights

    return load_stock_clip(comfyui_weights(tiny_models / "text_encoders" / "gpt_oss_tiny_mxfp4.safetensors"))


@pytest.fixture
def models(host, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/diffusion_models of this test alone, where the node writes; models/unet is searched first."""
    import folder_paths

    names = folder_paths.folder_names_and_paths
    folders = [tmp_path / "unet", tmp_path / "diffusion_models"]
    for folder in folders:
        folder.mkdir()
    searched = [str(folder) for folder in (*folders, tiny_models / "diffusion_models")]
    monkeypatch.setitem(names, "diffusion_models", (searched, names["diffusion_models"][1]))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folders[1]


@pytest.fixture
def velocity(tiny: Tiny) -> Iterator[Callable[[Any], torch.Tensor]]:
    """One forward of a MODEL, loaded with its patches."""
    import comfy.model_management

    from tests.host.helpers import random_context, random_latent

    x, sigma, context = random_latent(1, (5, 3)), torch.tensor([0.7]), random_context(1, 6)

    def run(model: Any) -> torch.Tensor:
        comfy.model_management.load_models_gpu([model])
        dtype = model.model.get_dtype_inference()
        return model.model.diffusion_model(x.to(dtype), sigma.to(dtype), context.to(dtype)).float()

    yield run
    comfy.model_management.load_models_gpu([tiny.model])


@pytest.fixture
def management(host, tiny):
    """ComfyUI's memory manager, with no model loaded before and after."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    yield comfy.model_management
    comfy.model_management.interrupt_current_processing(False)
    comfy.model_management.unload_all_models()
