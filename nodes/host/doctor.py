"""The doctor's report inside ComfyUI: on ComfyUI itself, the models of a graph, and the files it lists.

ComfyUI's own Lens, which the denoiser is compared with, is handed to lens_core from here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.ldm.modules.attention
import comfy.memory_management
import comfy.model_management
import torch
from comfyui_version import __version__ as comfyui_version
from torch import nn

from ...lens_core.config import DenoiserConfig
from ...lens_core.doctor import Examination, Finding, Section, check
from ...lens_core.errors import CheckpointError, SettingError
from ...lens_core.loading import SUBFOLDERS
from ...lens_core.memory.layers import LayerStore
from . import paths
from .clip import LensClip
from .graphs import why_never
from .lora import path_of as lora_path
from .model import LensModel, source_of
from .progress import on_progress
from .vae import LensHostVAE

ALL = "all"
_QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def report(model: Any, clip: Any, vae: Any, files: str, hashes: bool, parity: bool) -> str:
    """The text; ``files`` are options of the loaders, one a line, or ``ALL``. Raises SettingError for an
    option that there is not, and what ComfyUI raises where the user cancels."""
    found = chosen(files)
    management = comfy.model_management
    if parity:
        management.unload_all_models()
        management.soft_empty_cache()
    examination = Examination(
        hashes=hashes,
        parity=parity,
        device=management.get_torch_device(),
        reference=host_lens,
        tokenizer_places=paths.tokenizer_places(),
    )
    sections = [host_section()]
    given = {"MODEL": model, "CLIP": clip, "VAE": vae}
    models = [Finding(name, describe(what)) for name, what in given.items() if what is not None]
    if models:
        sections.append(Section("Models of this graph", models))
    update = on_progress()
    return check(found, examination, lambda _, done, total: update(done, total), sections).text()


def chosen(files: str) -> list[Path]:
    """The paths of options, or of all folders; raises SettingError for an option that there is not."""
    names = [line.strip() for line in files.splitlines() if line.strip()]
    if names == [ALL]:  # whole folders: the lists leave damaged files out
        return paths.roots()
    return [_path_of(name) for name in names]


def _path_of(name: str) -> Path:
    for find in (*(partial(paths.path_of, component) for component in SUBFOLDERS), lora_path):
        try:
            return find(name)
        except CheckpointError:
            continue
    raise SettingError(
        f"There is no file or folder {name!r} for a Lens loader. Give the names that the loaders list, one a "
        f"line, or {ALL!r}."
    )


def host_section() -> Section:
    """ComfyUI: its version, and what of its start flags and choices concerns Lens."""
    management = comfy.model_management
    attention = comfy.ldm.modules.attention.optimized_attention.__name__
    rows = {
        "version": comfyui_version,
        "start flags": ", ".join(_flags()) or "none",
        "memory": f"{management.vram_state.name}, dynamic VRAM "
        f"{'on' if comfy.memory_management.aimdo_enabled else 'off'}",
        "attention": attention,
        "device": str(management.get_torch_device()),
    }
    return Section("ComfyUI", [Finding(name, text) for name, text in rows.items()])


def _flags() -> list[str]:
    """Start flags that are not at their default. Texts are not shown: they may be folders or names."""
    given = {
        name: value
        for name, value in sorted(vars(comfy.cli_args.args).items())
        if value != comfy.cli_args.parser.get_default(name)
    }
    return [f"--{name.replace('_', '-')}{_value(value)}" for name, value in given.items()]


def _value(value: Any) -> str:
    if value is True:
        return ""
    return f" {value}" if isinstance(value, bool | int | float) else " (given)"


def describe(what: Any) -> str:
    """A MODEL, CLIP or VAE: its file, precision, where it is, and what was done to it."""
    if isinstance(what, LensClip):
        return _clip(what)
    if isinstance(what, LensHostVAE):
        return f"{_file(what.patcher)}, {_spelled(what.vae_dtype)}, {_place(what.patcher)}"
    network = getattr(what, "model", None)
    if isinstance(network, LensModel):
        return _model(what, network)
    patcher = getattr(what, "patcher", what)
    inside = type(getattr(patcher, "model", what)).__name__
    return f"{inside}, from another loader than this pack's; {_changes(patcher)}"


def _model(patcher: Any, network: LensModel) -> str:
    kind = "quantised" if network.quantized else "not quantised"
    graphs = why_never(patcher)
    words = [_file(patcher), kind, f"computes in {_spelled(network.get_dtype_inference())}", _place(patcher)]
    words += [_changes(patcher), f"CUDA graphs {'possible' if graphs is None else f'not possible: {graphs}'}"]
    return ", ".join(words)


def _clip(clip: LensClip) -> str:
    model = clip.cond_stage_model
    layers: LayerStore = model.text.layers
    read = "read" if model.text.is_read else "not read yet"
    words = [_file(clip.patcher), f"experts {'in bf16' if model.text.dense else 'packed'}"]
    words += [f"computes in {_spelled(model.text.dtype)}", f"placement {model.placement}, {read}"]
    return ", ".join([*words, f"{layers.loaded / 1e9:.2f} of {layers.total / 1e9:.2f} GB on the GPU"])


def _file(patcher: Any) -> str:
    source = source_of(patcher)
    return "file unknown" if source is None else source.name


def _place(patcher: Any) -> str:
    loaded, size = patcher.loaded_size(), patcher.model_size()
    return f"{loaded / 1e9:.2f} of {size / 1e9:.2f} GB on {patcher.load_device}"


def _changes(patcher: Any) -> str:
    """LoRA and other changes of its weights, and of how it computes."""
    weights = len(getattr(patcher, "patches", ()))
    options = getattr(patcher, "model_options", {}).get("transformer_options", {})
    names = sorted(str(name) for name in options.get("patches", {}))
    words = [f"{weights} weights patched (LoRA)" if weights else "no weights patched"]
    return ", ".join(words + ([f"patches {', '.join(names)}"] if names else []))


def _spelled(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def host_lens(config: DenoiserConfig, dtype: torch.dtype) -> nn.Module:
    """ComfyUI's own Lens network on the meta device, with the reference's epsilon in its q/k norms (its own
    is 1e-5), computing by PyTorch's attention whatever ComfyUI was started with."""
    from comfy.ldm.lens.model import LensTransformer2DModel

    # torch's layers: with dynamic VRAM ComfyUI's have no tensors until they load.
    network = LensTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels // 4,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        enc_hidden_dim=config.enc_hidden_dim,
        selected_layer_index=tuple(range(config.num_text_layers)),
        dtype=dtype,
        device="meta",
        operations=nn,
    )
    for block in network.transformer_blocks:
        for name in _QK_NORMS:
            getattr(block.attn, name).eps = config.qk_norm_eps
    network.register_forward_pre_hook(_by_torch, with_kwargs=True)
    return network


def _by_torch(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    options = {"optimized_attention_override": _attention}
    return args, {**kwargs, "transformer_options": options}


def _attention(chosen: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
