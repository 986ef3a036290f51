"""A LoRA on a MODEL, ours or ComfyUI's own Lens: what ``lens_core.lora`` finds, as ComfyUI's patches."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import folder_paths
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...lens_core.errors import CheckpointError, first_of
from ...lens_core.lora import Matched, open_lora
from ...lens_core.lora.blocks import parse_block_strengths, strength_of
from ...lens_core.lora.delta import merged
from ...lens_core.weights.identity import identity
from .model import require_lens
from .stamp import stamp_of

log = logging.getLogger(__name__)
# The denoiser's place in ComfyUI's model, which its patches' names begin with.
PREFIX = "diffusion_model."
# Where a MODEL keeps what has been put into it, as LensSaveModel writes it into a file.
LORAS = "lens_loras"
_FOLDER = "loras"
_ENDINGS = (".safetensors", ".sft")
_TEXT_ENCODER = ("lora_te", "text_encoder", "text_model", "te_", "te1_", "te2_")
_PEFT_CONFIG = "adapter_config.json"
# Of OFT ComfyUI's adapters leave ``rescale`` out and square the strength; cores they want with 4 dimensions.
_DEFINED_HERE = {"oft_blocks", "oft_R.weight", "lora_mid.weight", "hada_t1", "lokr_t2"}

Layer = Mapping[str, Tensor]


class DefinedAdapter(WeightAdapterBase):
    """An adapter that changes a weight by ``lens_core.lora.delta``, where ComfyUI's own do otherwise."""

    name = "lens"

    def __init__(self, loaded_keys: set[str], weights: Any) -> None:
        """``weights``: (name, tensor) of each tensor, or a number for alpha, as ComfyUI moves them about."""
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """Weight [O, I] with the adapter, in its dtype and where it is."""
        cast = comfy.model_management.cast_to_device
        layer = {
            name: cast(value, weight.device, torch.float32)
            if isinstance(value, Tensor)
            else torch.tensor(value)
            for name, value in self.weights
        }
        return merged(weight, layer, strength).to(weight.dtype)


def choices() -> list[str]:
    """Files of models/loras that may be LoRAs."""
    return [name for name in folder_paths.get_filename_list(_FOLDER) if name.lower().endswith(_ENDINGS)]


def stamp(lora_name: str) -> str:
    """Changes with the file, and with the settings that PEFT writes beside it; "" where there is none."""
    path = folder_paths.get_full_path(_FOLDER, lora_name)
    if path is None:
        return ""
    return stamp_of(filter(Path.is_file, (Path(path), Path(path).with_name(_PEFT_CONFIG))))


def apply_lora(model: Any, lora_name: str, strength: float, block_strengths: str = "") -> tuple[Any, str]:
    """A clone of MODEL with the LoRA, and what to tell the user; at strength 0 the MODEL itself.

    Raises SettingError for a MODEL that is not Lens and for ``block_strengths`` that make no sense,
    CheckpointError for a file that is no LoRA for Lens.
    """
    require_lens(model, "patches", ", or use LoraLoaderModelOnly")
    network = model.model.diffusion_model
    entries = parse_block_strengths(block_strengths, len(network.transformer_blocks))
    if strength == 0:
        return model, f"{lora_name}: strength 0, the model is as it was."
    file = open_lora(path_of(lora_name))
    matched = file.match(_linear_sizes(network))
    clone = model.clone()
    by_strength: defaultdict[float, dict[str, Layer]] = defaultdict(dict)
    for layer, tensors in matched.layers.items():
        by_strength[strength_of(layer, entries)][layer] = tensors
    switched_off = len(by_strength.pop(0.0, {}))
    left = [name for factor, layers in by_strength.items() for name in _add(clone, layers, strength * factor)]
    told = {"file": Path(lora_name).name, "strength": strength, "identity": identity(file.checkpoint.paths)}
    if entries:
        told["block_strengths"] = block_strengths.strip()
    clone.attachments[LORAS] = [*model.attachments.get(LORAS, ()), told]
    text = _report(lora_name, matched, strength, len(matched.layers) if entries else 0, switched_off, left)
    log.log(logging.WARNING if left or matched.unmatched else logging.INFO, "Lens LoRA: %s", text)
    return clone, text


def path_of(lora_name: str) -> Path:
    path = folder_paths.get_full_path(_FOLDER, lora_name)
    if path is None:
        raise CheckpointError(
            f"There is no LoRA {lora_name!r} in models/{_FOLDER}. Put it there and press R to refresh the "
            "list."
        )
    return Path(path)


def _linear_sizes(network: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each linear by name, whosever class it is and however it is quantised."""
    layers = network.named_modules()
    return {name: (m.out_features, m.in_features) for name, m in layers if hasattr(m, "in_features")}


def _add(clone: Any, layers: Mapping[str, Layer], strength: float) -> list[str]:
    """Patch these layers; returns the names of tensors that nothing took."""
    patches: dict[str, Any] = {}
    left: list[str] = []
    for layer, tensors in layers.items():
        found, unused = _patches(layer, tensors)
        patches |= found
        left += unused
    taken = clone.add_patches(patches, strength)
    return left + [key.removeprefix(PREFIX) for key in patches if key not in taken]


def _patches(layer: str, tensors: Layer) -> tuple[dict[str, Any], list[str]]:
    """ComfyUI's patches for a layer's weight and bias, and the names of tensors that are in none."""
    key = f"{PREFIX}{layer}.weight"
    own: dict[str, Any] = {}
    if _DEFINED_HERE & tensors.keys() or _is_dora_by_row(tensors):
        weights = tuple(
            (name, t.item() if t.ndim == 0 else t) for name, t in tensors.items() if name != "diff_b"
        )
        own[key] = DefinedAdapter(set(), weights)
        tensors = {name: tensor for name, tensor in tensors.items() if name == "diff_b"}
    named = {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
    patches = comfy.lora.load_lora(named, {layer: key}, log_missing=False)
    taken = {f"{layer}.alpha"}  # of no meaning for a difference
    for patched, patch in patches.items():
        if isinstance(patch, WeightAdapterBase):
            taken |= patch.loaded_keys
        else:
            taken.add(f"{layer}.diff" if patched == key else f"{layer}.diff_b")
    return own | patches, [name for name in named if name not in taken]


def _is_dora_by_row(tensors: Layer) -> bool:
    """ComfyUI takes the norm of the weight before the change there, and the paper that of the changed one."""
    return "dora_scale" in tensors and tensors["dora_scale"].shape[0] != 1


def _report(
    lora_name: str, matched: Matched, strength: float, by_block: int, switched_off: int, left: Iterable[str]
) -> str:
    sentences = [f"{lora_name}: {matched.summary(strength)}."]
    if by_block:
        sentences.append(f"block_strengths: {switched_off} of {by_block} layers are at 0.")
    if text := [key for key in matched.unmatched if key.startswith(_TEXT_ENCODER)]:
        sentences.append(f"Keys for a text encoder, which are not used: {len(text)}.")
    if names := list(left):
        sentences.append(f"Not applied by ComfyUI: {first_of(names, 3)}.")
    return " ".join(sentences)
