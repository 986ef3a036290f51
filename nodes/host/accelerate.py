"""Speed that costs something, and is therefore chosen by a node: CUDA graphs, and the attention."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from comfy.patcher_extension import CallbacksMP

from ...lens_core.denoiser import BlockGraphs
from ...lens_core.errors import SettingError
from ...lens_core.ops import flash3_on
from .attention import ATTENTION, ATTENTIONS
from .denoiser import GRAPHS
from .graphs import why_never
from .model import LensModel
from .settings import one_of
from .shelf import plain_clone

log = logging.getLogger(__name__)


def accelerate(model: Any, cuda_graphs: bool, attention: str) -> Any:
    """A clone of MODEL with these settings; those of an earlier node are gone.

    Raises SettingError for another loader's model, and for FlashAttention-3 where it cannot run. Graphs that
    cannot be are a line in the log: the pictures are the same without them.
    """
    network = _lens(model)
    if one_of("attention", attention, ATTENTIONS) == "flash_attn3":
        head_dim = network.diffusion_model.config.attention_head_dim
        flash3_on(model.load_device, network.get_dtype_inference(), head_dim)
    model = model.clone()
    options = model.model_options["transformer_options"]
    for name in (GRAPHS, ATTENTION):
        options.pop(name, None)
    if attention != "auto":
        options[ATTENTION] = attention
    return _with_graphs(model) if cuda_graphs else model


def _with_graphs(model: Any) -> Any:
    """A clone with graphs of its own, or the MODEL itself and why in the log."""
    reason = why_never(model)
    if reason is not None:
        log.warning("LensAccelerate: no CUDA graphs: %s.", reason)
        return model
    # Dynamic VRAM moves weights at any time, and a graph reads them where they lay.
    model, graphs = plain_clone(model), BlockGraphs()
    model.model_options["transformer_options"][GRAPHS] = graphs
    model.add_callback_with_key(CallbacksMP.ON_DETACH, GRAPHS, partial(_give_back, graphs))
    return model


def _give_back(graphs: BlockGraphs, patcher: Any, unpatch_all: bool) -> None:
    """When ComfyUI unloads a model; before each run it also detaches it, but leaves the weights there."""
    if unpatch_all:
        graphs.clear()


def _lens(model: Any) -> LensModel:
    """The network of a MODEL from LensModelLoader; raises SettingError for another."""
    network = getattr(model, "model", None)
    if isinstance(network, LensModel):
        return network
    got = "no model" if network is None else f"another loader's {type(network).__name__}"
    raise SettingError(
        f"LensAccelerate works only on models from LensModelLoader, and got {got}. Load the Lens file with "
        "LensModelLoader."
    )
