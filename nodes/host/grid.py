"""A grid of pictures: prompts are encoded first, then each model is loaded once and draws all of its own,
then all are decoded. So no model comes to the GPU twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...lens_core.config import LENS, Variant
from ...lens_core.errors import SettingError, first_of
from ...lens_core.grid import Axes, arrange, as_labels, draw_sheet, layout, parse_prompts, parse_seeds
from ...lens_core.loading import open_denoiser
from ...lens_core.quant.policy import CHOICES, NONE
from ...lens_core.sampling import bucket
from ...lens_core.weights import variant_at
from . import paths
from .conditioning import encode_each, require_clip
from .missing import NONE_YET
from .model import require_lens, source_of
from .noise import HOST
from .progress import on_progress, say
from .sampling import Latent, decode, empty_latent, require_fitting_vae, require_vae, sample, samples_for
from .settings import one_of
from .shelf import shelved_model

_SHOWN = 6


@dataclass(frozen=True)
class Drawer:
    """What draws a part of the grid: a MODEL, or None and the checkpoint that becomes one."""

    label: str
    steps: int
    cfg: float
    model: Any = None
    checkpoint: str = ""
    quantization: str = NONE

    def open(self) -> Any:
        """The MODEL, loaded where it is not yet."""
        return self.model or shelved_model(self.checkpoint, None, self.quantization)[0]


def draw_grid(
    clip: Any,
    vae: Any,
    model: Any,
    *,
    prompts: str,
    negative: str,
    seeds: str,
    checkpoints: Sequence[str],
    quantizations: Sequence[str],
    size: tuple[int, str],
    steps: int,
    cfg: float,
    columns: str,
    node_id: str | None,
) -> tuple[Tensor, Tensor, str]:
    """A labelled sheet [1, H, W, 3]; its pictures [N, h, w, 3], on the CPU; a line of text for each.

    ``prompts`` are lines, ``seeds`` as for ``parse_seeds``, ``size`` a base resolution and an aspect ratio; 0
    ``steps`` or ``cfg`` are each checkpoint's own. What is wrong with any of it is said before a model runs.
    """
    require_clip(clip)
    require_vae(vae)
    height, width = bucket(*size)
    drawers = drawers_of(model, checkpoints, quantizations, steps, cfg)
    axes = Axes(tuple(each.label for each in drawers), parse_prompts(prompts), parse_seeds(seeds))
    arrangement = arrange(axes, columns, f"{width}x{height}")
    layout(arrangement, height, width)
    say(f"Encoding {len(axes.prompts)} prompts", node_id)
    positives, avoided = encode_each(clip, axes.prompts, negative)
    latents: list[Tensor] = []
    for drawer in drawers:
        say(f"Loading {drawer.label}", node_id)
        drawing = drawer, empty_latent(height, width, 1), vae
        latents += _drawn(*drawing, positives, avoided, axes, len(latents), node_id)
    pictures = _decoded(latents, vae, (height, width), node_id)
    say(f"{axes.count} pictures, {width}x{height}", node_id)
    return draw_sheet(pictures, arrangement), pictures, "\n".join(as_labels(axes))


def drawers_of(
    model: Any, checkpoints: Sequence[str], quantizations: Sequence[str], steps: int, cfg: float
) -> list[Drawer]:
    """The connected MODEL first, then each checkpoint in each quantisation.

    Raises SettingError where there is none at all, CheckpointError for a name that is no denoiser's.
    """
    found = []
    if model is not None:
        require_lens(model, does="draws", instead="")
        source = source_of(model)
        variant = LENS if source is None else _variant(source)
        name = "MODEL" if source is None else _short(source.name)
        label = f"{name} + LoRA" if model.patches else name
        found.append((label, variant, {"model": model}))
    for name, mode in product(dict.fromkeys(checkpoints), dict.fromkeys(quantizations or [NONE])):
        variant = _variant(paths.path_of("denoiser", name))
        one_of("quantizations", mode, CHOICES)
        label = _short(name) if mode == NONE else f"{_short(name)} ({mode})"
        found.append((label, variant, {"checkpoint": name, "quantization": mode}))
    if not found:
        there = paths.choices("denoiser")
        if there == [NONE_YET]:
            paths.path_of("denoiser", NONE_YET)  # says where files are
        raise SettingError(
            f"There is no model to draw with. Connect one, or choose checkpoints: {first_of(there, _SHOWN)}."
        )
    return [_drawer(label, steps or own.steps, cfg or own.cfg, source) for label, own, source in found]


def _drawer(label: str, steps: int, cfg: float, source: dict[str, Any]) -> Drawer:
    return Drawer(f"{label}, {steps} steps, cfg {cfg:g}", steps, cfg, **source)


def _variant(path: Path) -> Variant:
    """Which published checkpoint a denoiser is, as its loader says; raises CheckpointError for others."""
    file = open_denoiser(path)
    return variant_at(file.path, file.checkpoint.metadata)


def _short(name: str) -> str:
    return name.removesuffix(".safetensors").removesuffix(".gguf")


def _drawn(
    drawer: Drawer,
    latent: Latent,
    vae: Any,
    positives: Sequence[list],
    negative: list,
    axes: Axes,
    before: int,
    node_id: str | None,
) -> list[Tensor]:
    """Latents [1, C, h, w] of all prompts and seeds by one model, on the CPU; ``before``: others drawn."""
    model = drawer.open()
    require_fitting_vae(vae, samples_for(model, latent))
    found = []
    for number, (positive, seed) in enumerate(product(positives, axes.seeds), before):
        say(f"Picture {number + 1} of {axes.count}: {drawer.label}, seed {seed}", node_id)
        drawn = sample(
            model,
            positive,
            negative,
            latent,
            seed=seed,
            steps=drawer.steps,
            cfg=drawer.cfg,
            noise=HOST,
            denoise=1.0,
            part_of=(number * drawer.steps, axes.count * drawer.steps),
        )
        found.append(drawn["samples"].cpu())
    return found


def _decoded(latents: Sequence[Tensor], vae: Any, size: tuple[int, int], node_id: str | None) -> Tensor:
    """Pictures [N, h, w, 3] on the CPU, decoded one by one."""
    device = comfy.model_management.intermediate_device()
    pictures, update = torch.empty(len(latents), *size, 3), on_progress()
    for number, latent in enumerate(latents):
        say(f"Decoding {number + 1} of {len(latents)}", node_id)
        update(number, len(latents))
        pictures[number] = decode({"samples": latent.to(device)}, vae)[0]
    update(len(latents), len(latents))
    return pictures
