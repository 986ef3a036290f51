"""CUDA graphs of the denoiser's blocks under ComfyUI: where they can be, and which runs go without them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch

from ...lens_core.denoiser.graph import can_record
from ...lens_core.denoiser.modulation import modulation_bytes
from .attention import host_attention
from .denoiser import GRAPHS

log = logging.getLogger(__name__)


def why_never(model: Any) -> str | None:
    """Why no run of this MODEL from LensModelLoader can be by graphs, in words; None if they can."""
    device = model.load_device
    if device.type != "cuda" or torch.version.hip is not None:
        return "they are for NVIDIA GPUs"
    if not can_record():
        return (
            "ComfyUI runs with CUDA's asynchronous allocator, in which they cannot be recorded; "
            "start it with --disable-cuda-malloc to have them"
        )
    if host_attention(model.model_options["transformer_options"]) is not None:
        return "they take Lens' own attention alone, and another was chosen"
    management = comfy.model_management
    steps = model.model_size() - modulation_bytes(model.model.diffusion_model)
    needed, there = steps + management.minimum_inference_memory(), management.get_total_memory(device)
    if there < needed:
        return f"{needed / 1e9:.1f} GB must stay on the GPU for them, and it has {there / 1e9:.1f}"
    return None


@contextmanager
def graphs_of_run(patcher: Any, model_options: dict[str, Any]) -> Iterator[None]:
    """Around one run with these options: graphs taken out of them where they would be wrong, else what they
    did in the log."""
    options = model_options["transformer_options"]
    graphs = options.get(GRAPHS)
    reason = None if graphs is None else why_not_now(patcher, model_options)
    if reason is not None:
        log.warning("Lens: this run is without CUDA graphs: %s.", reason)
        graphs = None
        del options[GRAPHS]
    before = {} if graphs is None else dict(graphs.runs)
    yield
    if graphs is not None:
        log.info("Lens: CUDA graphs: %s.", graphs.report(before))


def why_not_now(patcher: Any, model_options: dict[str, Any]) -> str | None:
    """What in this run computes with the layers otherwise than a graph has recorded it, in words, or None.

    Not so a LoRA of the usual kind: it is in the weights, and graphs are told apart by where those lie.
    """
    if patcher.injections:
        return "a node changes how its layers compute (a LoRA in bypass mode does)"
    if patcher.weight_wrapper_patches:
        return "a node computes its weights anew in each step"
    if "registered_hooks" in model_options:
        return "hooks change its weights from prompt to prompt"
    if any(name.startswith("diffusion_model.") for name in patcher.object_patches):
        return "a node has replaced some of its layers"
    if "torch_compile_kwargs" in model_options:
        return "it is compiled"
    if patcher.get_additional_models_with_key("multigpu"):
        return "it is spread over several GPUs"
    return None
