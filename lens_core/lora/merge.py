"""LoRAs to merge into a denoiser's weights as these are read."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import SettingError
from ..weights.identity import identity
from .delta import merged, merged_bias
from .file import Matched, Sizes, open_lora

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A LoRA's file and its strength, as a user gives them."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        """Without folders, as settings of a picture name it."""
        return f"{self.path.name}:{self.strength:g}"


@dataclass(frozen=True)
class Merge:
    """What becomes of a denoiser's weights: LoRAs with their strengths, in order; ``metadata`` names them."""

    loras: Sequence[tuple[Matched, float]] = ()
    metadata: str = ""

    def weights(self) -> set[str]:
        """The linears whose weights change."""
        return {
            name for lora, _ in self.loras for name, layer in lora.layers.items() if set(layer) != {"diff_b"}
        }

    def biases(self) -> set[str]:
        """Those whose biases do."""
        return {name for lora, _ in self.loras for name, layer in lora.layers.items() if "diff_b" in layer}

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """A linear's weight [N, K] with all of them, in fp32; as it is where none changes it."""
        for lora, strength in self.loras:
            if name in lora.layers:
                weight = merged(weight, lora.layers[name], strength)
        return weight

    def bias(self, name: str, bias: Tensor) -> Tensor:
        """A linear's bias [N] with all of them, in fp32."""
        for lora, strength in self.loras:
            bias = merged_bias(bias, lora.layers.get(name, {}), strength)
        return bias


NO_LORAS = Merge()


def parse_choice(text: str) -> Choice:
    """``FILE:STRENGTH`` or ``FILE``, whose own name may have colons (``C:\\loras\\x.safetensors``).

    Raises SettingError for a strength that is no number.
    """
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return Choice(Path(text))
    try:
        number = float(strength)
    except ValueError:
        if path and Path(path).exists():
            raise SettingError(f"The strength of {path} must be a number, got {strength!r}.") from None
        return Choice(Path(text))
    if not math.isfinite(number):
        raise SettingError(f"The strength of {path} must be a finite number, got {strength}.")
    return Choice(Path(path), number)


def open_loras(choices: Iterable[Choice], sizes: Sizes) -> Merge:
    """Find their layers in a denoiser with linears of these ``sizes``; logs a line of each.

    Raises CheckpointError where a file is none, or for another model.
    """
    loras, told = [], []
    for choice in choices:
        file = open_lora(choice.path)
        lora = file.match(sizes)
        log.info("LoRA %s: %s.", choice.path.name, lora.summary(choice.strength))
        told.append(
            {
                "file": choice.path.name,
                "strength": choice.strength,
                "identity": identity(file.checkpoint.paths),
            }
        )
        if choice.strength:
            loras.append((lora, choice.strength))
    return Merge(tuple(loras), json.dumps(told) if told else "")
