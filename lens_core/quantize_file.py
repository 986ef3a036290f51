"""A denoiser's file, quantised once and for all: small on disk, and nothing to quantise at each start. LoRAs
can be merged into it.

The result is one safetensors file under the checkpoint's own names, in ComfyUI's layout for quantised layers:
its own loader reads every mode but those in 4-bit integers, whose format is this pack's.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .config import Variant
from .denoiser import LensDenoiser
from .denoiser_file import DenoiserFile
from .errors import CheckpointError, SettingError
from .lora.merge import NO_LORAS, Merge
from .quant.policy import MODES, NONE
from .quantized import replace_linears
from .weights import DENOISER, variant_at, variant_metadata
from .weights.identity import identity
from .weights.loader import OnTensor, Part, Plan, Source, plan_load
from .weights.quantized import UNUSED
from .weights.writer import SteppedWriter, part_of

log = logging.getLogger(__name__)
SUFFIX = ".safetensors"
_FORMAT = ".comfy_quant"


def quantize_file(
    file: DenoiserFile,
    mode: str,
    target: Path,
    device: torch.device | str = "cpu",
    on_tensor: OnTensor | None = None,
    *,
    overwrite: bool = False,
    loras: Merge = NO_LORAS,
) -> Path:
    """Write ``target``, the denoiser quantised by ``mode``, the rest in bf16; returns it.

    ``loras`` are merged into its weights first; with them the mode may be ``none``: all weights in bf16,
    or as the file has quantised them.

    Weights are quantised one at a time on ``device``. ``on_tensor(done, total)`` may raise to cancel: what is
    written stays in ``<target>.part``, and the same call goes on there. A target that holds just this already
    is left as it is; another's needs ``overwrite``. Raises SettingError and CheckpointError.
    """
    _check(file, mode, target, loras)
    plan, steps = _plan(file, mode, torch.device(device), loras)
    writer = SteppedWriter(target, steps, _metadata(file, mode, loras))
    if os.path.exists(target) and not overwrite:
        if not writer.is_written():
            raise SettingError(
                f"{target} exists already and is not {file.checkpoint.name} in {mode}. Give another name, "
                "or say that it is to be overwritten."
            )
        log.info("%s holds %s in %s already.", target, file.checkpoint.name, mode)
        return target
    writer.check_room()
    with writer:
        if writer.done:
            log.info("Going on with %s.", writer.part)
        _write(file, plan, writer, on_tensor)
        return writer.finish()


def variant_of_file(file: DenoiserFile) -> Variant:
    """Which published checkpoint it is."""
    return variant_at(file.path, file.checkpoint.metadata)


def _check(file: DenoiserFile, mode: str, target: Path, loras: Merge) -> None:
    """Raise where the request makes no sense, before anything is written."""
    name = file.checkpoint.name
    if mode not in MODES and not (mode == NONE and loras.metadata):
        raise SettingError(
            f"The quantization must be one of {', '.join(MODES)}, or {NONE} with a LoRA, got {mode}."
        )
    if mode != NONE and (stored := _stored_formats(file)):
        raise CheckpointError(
            f"{name} is quantised already ({', '.join(sorted(stored))}), and doing it again only adds error. "
            "Expected weights in bf16 or fp32: choose such a file."
        )
    if target.suffix != SUFFIX or os.path.isdir(target):
        what = "is a folder" if os.path.isdir(target) else f"does not end in {SUFFIX}"
        raise SettingError(f"{target} {what}. Give the name of a {SUFFIX} file to write.")
    there = [path for path in (target, part_of(target)) if os.path.exists(path)]
    if any(path.samefile(source) for path in there for source in file.checkpoint.paths):
        raise SettingError(f"{target} would replace the file that it is made from. Give another name.")


def _stored_formats(file: DenoiserFile) -> set[str]:
    """How a file's weights are quantised; nothing for one that is not."""
    plain = {info.dtype for info in file.checkpoint.header.values() if info.dtype.startswith("F8_")}
    return {part.called for part in file.stored.values()} or plain


def _plan(
    file: DenoiserFile, mode: str, device: torch.device, loras: Merge
) -> tuple[Plan, list[dict[str, Tensor]]]:
    """What is made from what, and the tensors of each step without memory, in the order of the new file.

    A step is a stored tensor and what becomes of it, in the order in which the source is read; last come the
    names of the formats, whose odd lengths would put what follows them at odd bytes.
    """
    layers = file.layers(mode, device, loras)
    model = LensDenoiser(file.config, dtype=torch.bfloat16, device="meta")
    replace_linears(model, {name: part.packed for name, part in layers.items()})
    parts = file.parts(layers, loras)
    plan = plan_load(model, file.checkpoint, DENOISER, unused=UNUSED, parts=parts)
    made = model.state_dict()

    def tensors(part: Part) -> dict[str, Tensor]:
        names = [name for name in part.targets if not name.endswith(_FORMAT)]
        return {name: made[name] for name in sorted(names, key=lambda name: -made[name].itemsize)}

    # Every tensor is to begin at a multiple of its numbers' size, of which 4 is the largest.
    ordered = sorted(plan.steps, key=lambda step: any(t.nbytes % 4 for t in tensors(step[0]).values()))
    plan = Plan(tuple(ordered), plan.total, plan.shapes)
    formats = {name: tensor for name, tensor in made.items() if name.endswith(_FORMAT)}
    return plan, [*(tensors(part) for part, _ in ordered), formats]


def _metadata(file: DenoiserFile, mode: str, loras: Merge) -> dict[str, str]:
    """What the file says of itself; by the sources' identities, another's part is not gone on with."""
    return {
        **({"lens.loras": loras.metadata} if loras.metadata else {}),
        "format": "pt",
        **variant_metadata(variant_of_file(file)),
        "lens.quantization": mode,
        "lens.source": identity(file.checkpoint.paths),
    }


def _write(file: DenoiserFile, plan: Plan, writer: SteppedWriter, on_tensor: OnTensor | None) -> None:
    checkpoint = file.checkpoint
    for index in range(writer.done, len(plan.steps)):
        part, names = plan.steps[index]
        sources = [Source(checkpoint.header[name], partial(checkpoint.read, name)) for name in names]
        writer.write(dict(zip(part.targets, part.make(sources, torch.bfloat16), strict=True)))
        if on_tensor is not None:
            on_tensor(index + 1, len(plan.steps))
    writer.write(writer.steps[-1])
