"""What a file's metadata, or an adapter_config.json beside it, says of alpha where no tensor does.

In the conventions of

- PEFT's ``adapter_config.json`` (https://huggingface.co/docs/peft, LoraConfig): scale alpha / rank, or
  alpha / sqrt(rank) with ``use_rslora``; ``alpha_pattern`` for single layers;
- diffusers' ``save_lora_weights`` and ``save_lora_adapter`` (SceneWorks writes LoRAs by it): the same as JSON
  under ``lora_adapter_metadata``, in the former each key behind ``transformer.``;
- LoboForge's LensTrainer: ``alpha`` and ``rank``; SceneWorks' LoKr: these and ``networkType``;
- sd-scripts: ``ss_network_alpha``. Its files have tensors too, and musubi's convert_lora.py multiplies those
  into the weights, renames to lora_A and lora_B and leaves the metadata: there it counts no more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

# Entries of the metadata that hold all the settings as JSON.
_NESTED = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")
_ALPHA = ("lora_alpha", "alpha", "network_alpha")
_RANK = ("r", "rank", "lora_rank")
# diffusers keeps the configs of a pipeline's parts in one object.
_PREFIX = "transformer."
# Lens has 582 linears.
_MOST_PATTERNS = 2000
# PEFT's number of terms of the series that stands for the inverse in OFT.
TERMS = 5


class Scaling(NamedTuple):
    """alpha and rank of all layers and of single ones, and what is computed with them.

    ``sd_scripts_alpha`` counts for that program's own keys alone. ``peft_lokr``: the scale is alpha / rank
    even where both of LoKr's factors are whole. ``oft_terms``: those of the Neumann series, 0 for the
    inverse itself.
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = {}
    rank: float | None = None
    ranks: Mapping[str, float] = {}
    sd_scripts_alpha: float | None = None
    square_root: bool = False
    peft_lokr: bool = False
    oft_terms: int = TERMS

    def scale(self, layer: str, rank: int | None, sd_scripts: bool = False) -> float | None:
        """What a layer's change is multiplied by; None where nothing says so.

        ``layer``: its name in the file; ``rank``: that of its tensors, if they tell; ``sd_scripts``: whether
        its keys are that program's.
        """
        given = _of_layer(self.alphas, layer, self.alpha)
        alpha = self.sd_scripts_alpha if given is None and sd_scripts else given
        divisor = rank or _of_layer(self.ranks, layer, self.rank)
        if alpha is None or not divisor:
            return None
        return alpha / (math.sqrt(divisor) if self.square_root else divisor)


def read_scaling(metadata: Mapping[str, Any]) -> Scaling:
    """The settings in metadata, whose values are strings, or in an adapter_config.json's content."""
    settings: dict[str, Any] = {}
    for name in _NESTED:
        settings |= _object(metadata.get(name))
    settings |= metadata
    settings |= {
        name.removeprefix(_PREFIX): value for name, value in settings.items() if name.startswith(_PREFIX)
    }
    terms = _number(settings.get("num_cayley_neumann_terms"))
    exact = str(settings.get("use_cayley_neumann")).lower() == "false"
    return Scaling(
        alpha=_first(settings, _ALPHA),
        alphas=_patterns(settings.get("alpha_pattern")),
        rank=_first(settings, _RANK),
        ranks=_patterns(settings.get("rank_pattern")),
        sd_scripts_alpha=_number(settings.get("ss_network_alpha")),
        square_root=str(settings.get("use_rslora")).lower() in ("true", "1"),
        peft_lokr="lokr" in (str(settings.get(name)).lower() for name in ("peft_type", "networkType")),
        oft_terms=0 if exact else int(min(terms, 64)) if terms and terms > 0 else TERMS,
    )


def _of_layer(patterns: Mapping[str, float], layer: str, default: float | None) -> float | None:
    """The number for a layer: that of the first pattern which is its name or the end of it."""
    for pattern, number in patterns.items():
        if f".{layer}".endswith(f".{pattern}"):
            return number
    return default


def _object(value: Any) -> dict[str, Any]:
    """A JSON object, as it is or in a string; empty where it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _patterns(value: Any) -> dict[str, float]:
    """Numbers by layers' names, or ends of them.

    PEFT takes these for regular expressions; from a stranger's file such could run for ever.
    """
    found = ((name, _number(number)) for name, number in islice(_object(value).items(), _MOST_PATTERNS))
    return {
        name.removeprefix("^").removesuffix("$").replace("\\.", "."): number
        for name, number in found
        if number is not None
    }


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    return next((number for name in names if (number := _number(settings.get(name))) is not None), None)


def _number(value: Any) -> float | None:
    """A finite number, also one in a string; sd-scripts writes "None" where it has none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
