"""A denoiser's file or folder, opened and checked but not read; quantised, or to be as it is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import is_modulation
from .denoiser import LensDenoiser
from .lora.merge import NO_LORAS, Merge
from .quant import policy
from .quant.layer_format import LayerFormat
from .quant.linear import Packed, dequantize
from .quant.policy import AUTO, MODES, NONE, Mode
from .quant.requantize import requantize
from .quantized import linear_sizes, replace_linears
from .weights import DENOISER, denoiser_config, load_into
from .weights.keymap import rename
from .weights.kind import open_part
from .weights.loader import AnyCheckpoint, OnTensor, Part, Source, Stored, plan_load
from .weights.quantized import UNUSED, stored_layers
from .weights.quantized_part import QuantizedPart

log = logging.getLogger(__name__)


class DenoiserFile:
    """What a path holds. Raises CheckpointError where that is no Lens denoiser."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: AnyCheckpoint = open_part(path, "denoiser")
        self.config = denoiser_config(self.checkpoint)
        self.sizes = linear_sizes(LensDenoiser(self.config, device="meta"))
        source = rename(self.checkpoint.header, DENOISER, file=self.checkpoint.name)
        self.stored = stored_layers(self.checkpoint, source, self.sizes)

    def mode(self, quantization: str, device: torch.device, free: int | None = None) -> str:
        """What a choice means for this file on this device; the log has the reason where it means another.

        ``free``: bytes of GPU memory that there will be, where the caller knows better than the GPU.
        """
        mode, why = self.meant(quantization, device, free)
        if why:
            log.log(logging.INFO if quantization == AUTO else logging.WARNING, "%s", why)
        return mode

    def meant(self, quantization: str, device: torch.device, free: int | None = None) -> tuple[str, str]:
        """The same, and the reason, "" where it means itself. Of a file that is quantised already, whether
        inputs are is all that can be chosen."""
        if quantization == NONE:
            return NONE, ""
        if self.stored:
            return self._meant_as_stored(quantization)
        if quantization != AUTO:
            return quantization, ""
        steps = {
            name: rows * columns for name, (rows, columns) in self.sizes.items() if not is_modulation(name)
        }
        there, capability, name = _gpu(device)
        mode, why = policy.choose(steps, there if free is None else free, capability, name)
        return mode, f"Quantisation: auto chose {mode}: {why}."

    def _meant_as_stored(self, quantization: str) -> tuple[str, str]:
        if quantization == AUTO:
            return NONE, f"Quantisation: auto keeps {self.checkpoint.name} as it is quantised."
        wanted = MODES[quantization].form
        alike = [_alike(part.packed.form, wanted) for part in self.stored.values()]
        if all(alike) or (any(alike) and wanted.kind is not None):
            return quantization, ""
        called = ", ".join(sorted({part.called for part in self.stored.values()}))
        return NONE, (
            f"{self.checkpoint.name} is quantised already ({called}), so its weights stay as they are; "
            f"quantization {quantization} is for files in bf16 or fp32."
        )

    def load(
        self,
        module: nn.Module,
        dtype: torch.dtype | None,
        *,
        mode: str = NONE,
        structure: nn.Module | None = None,
        device: torch.device | str = "cpu",
        read: Callable[[str], Tensor] | None = None,
        on_tensor: OnTensor | None = None,
        loras: Merge = NO_LORAS,
    ) -> None:
        """Fill ``module``, a denoiser without memory, quantised by ``mode`` if the file is not already.

        Weights are quantised one at a time on ``device``; all tensors end on the CPU. ``structure`` as in
        ``load_into``: a LensDenoiser, where the module's linears are not torch's. ``loras`` are merged into
        the weights before they are quantised, or into what a quantised file's weights stand for.
        """
        layers = self.layers(mode, torch.device(device), loras)
        structure = module if structure is None else structure
        replace_linears(structure, {name: part.packed for name, part in layers.items()})
        load_into(
            module,
            self.checkpoint,
            DENOISER,
            dtype,
            structure=structure,
            unused=UNUSED,
            parts=self.parts(layers, loras),
            read=read,
            on_tensor=on_tensor,
        )

    def check(self) -> None:
        """Raise CheckpointMismatch or CheckpointError where ``load`` would; nothing is read."""
        structure = LensDenoiser(self.config, device="meta")
        replace_linears(structure, {name: part.packed for name, part in self.stored.items()})
        parts = self.parts(self.stored)
        plan_load(structure, self.checkpoint, DENOISER, unused=UNUSED, parts=parts)

    def parts(self, layers: Mapping[str, QuantizedPart], loras: Merge = NO_LORAS) -> list[Part]:
        """All tensors that are not as they are stored: those of ``layers``, and what ``loras`` change."""
        plain = sorted(loras.weights() - set(layers))
        return [
            *(part.part(name) for name, part in layers.items()),
            *(_merging(f"{name}.weight", self.sizes[name], partial(loras.weight, name)) for name in plain),
            *(
                _merging(f"{name}.bias", self.sizes[name][:1], partial(loras.bias, name))
                for name in sorted(loras.biases())
            ),
        ]

    def layers(self, mode: str, device: torch.device, loras: Merge = NO_LORAS) -> dict[str, QuantizedPart]:
        """The linears that are quantised, in the file or by ``mode``, as ``mode()`` has it, with ``loras``
        in them."""
        changed = loras.weights()
        if self.stored:
            return {
                name: _merging_stored(name, part, loras, device) if name in changed else part
                for name, part in self._stored(mode).items()
            }
        if mode == NONE:
            return {}
        wanted = MODES[mode]
        return {
            name: _quantizing(name, size, wanted, device, loras)
            for name, size in self.sizes.items()
            if policy.quantizes(name, size, wanted)
        }

    def _stored(self, mode: str) -> dict[str, QuantizedPart]:
        """The file's own quantised linears, their inputs quantised as ``mode`` says."""
        if mode == NONE:
            return self.stored
        wanted = MODES[mode].form
        dynamic = wanted.inputs is not None
        return {
            name: part.dynamic(dynamic) if _alike(part.packed.form, wanted) else part
            for name, part in self.stored.items()
        }


def _alike(stored: LayerFormat, wanted: LayerFormat) -> bool:
    """Whether a file's layer is what a mode would make, its groups and inputs aside."""
    return (stored.name, stored.bits) == (wanted.name, wanted.bits)


def _gpu(device: torch.device) -> tuple[int | None, tuple[int, int] | None, str]:
    """Bytes of GPU memory that other programs leave (None: unknown), an NVIDIA GPU's capability, its name."""
    if device.type == "cpu":
        return None, None, "the CPU"
    if device.type != "cuda":
        return None, None, f"the {device.type.upper()} device"
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    capability = None if torch.version.hip is not None else torch.cuda.get_device_capability(device)
    return free, capability, torch.cuda.get_device_name(device)


def _quantizing(
    name: str, size: tuple[int, int], mode: Mode, device: torch.device, loras: Merge
) -> QuantizedPart:
    """A layer that is quantised as it is read."""
    stored = Stored(f"{name}.weight", (size, (*size, 1, 1)))
    packed = policy.empty(size, mode.form)

    def make(sources: Sequence[Source]) -> Packed:
        weight = sources[0].read(None).view(size)
        return policy.pack(loras.weight(name, weight), mode, device)

    return QuantizedPart(packed, (stored,), make, mode.form.name)


def _merging_stored(name: str, part: QuantizedPart, loras: Merge, device: torch.device) -> QuantizedPart:
    """A layer that is quantised in the file: unpacked, changed, and quantised as it was."""

    def make(sources: Sequence[Source]) -> Packed:
        weight = loras.weight(name, dequantize(part.make(sources), torch.float32))
        packed = requantize(weight.to(device), part.packed)
        tensors = [None if tensor is None else tensor.to("cpu") for tensor in packed[1:]]
        return Packed(packed.form, *tensors)  # type: ignore[arg-type]

    return replace(part, make=make)


def _merging(name: str, shape: Sequence[int], merged: Callable[[Tensor], Tensor]) -> Part:
    """A tensor that is changed and stays as wide as it was."""
    size = tuple(shape)

    def make(sources: Sequence[Source], dtype: torch.dtype | None) -> list[Tensor]:
        tensor = sources[0].read(None).view(size)
        return [merged(tensor).to(dtype or tensor.dtype)]

    return Part((Stored(name, (size, (*size, 1, 1))),), (name,), make)
