"""What a file's metadata, or an adapter_config.json beside it, says of alpha where no tensor does.

In the conventions of: PEFT (``adapter_config.json``; https://huggingface.co/docs/peft, LoraConfig: scale
alpha / rank, or alpha / sqrt(rank) with ``use_rslora``, ``alpha_pattern`` for single layers); diffusers (that
same as JSON under ``lora_adapter_metadata``, each key behind ``transformer.``); sd-scripts
(``ss_network_alpha``, ``ss_network_dim``); and trainers that write ``lora_alpha`` or ``alpha`` and ``rank``
plainly (LoboForge, SceneWorks).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

# Entries of the metadata that hold all the settings as JSON.
_NESTED = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")
_ALPHA = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_RANK = ("r", "rank", "lora_rank", "network_dim", "ss_network_dim")
# diffusers has one config for each part of a pipeline in one.
_PREFIX = "transformer."


class Scaling(NamedTuple):
    """alpha of all layers and of single ones, the rank that goes with it, and what the scale is of them."""

    alpha: float | None = None
    by_layer: Mapping[str, float] = {}
    rank: int | None = None
    square_root: bool = False
    peft: bool = False
    cayley_exact: bool = False

    def alpha_of(self, name: str) -> float | None:
        """Of the layer of this name in the file. PEFT's patterns name a layer or the end of its name.

        (PEFT takes them for regular expressions, which nobody's file should make this program run.)
        """
        for pattern, alpha in self.by_layer.items():
            literal = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if name == literal or name.endswith(f".{literal}"):
                return alpha
        return self.alpha

    def scale(self, name: str, rank: int) -> float | None:
        """What a layer's change is multiplied by; None where the file does not say."""
        alpha = self.alpha_of(name)
        return None if alpha is None else alpha / (math.sqrt(rank) if self.square_root else rank)


def read_scaling(metadata: Mapping[str, Any]) -> Scaling:
    """The settings in metadata, whose values are strings, or in an adapter_config.json's content."""
    settings: dict[str, Any] = {}
    for name in _NESTED:
        settings |= _json_object(metadata.get(name))
    settings |= metadata
    settings |= {k.removeprefix(_PREFIX): v for k, v in settings.items() if k.startswith(_PREFIX)}
    patterns = settings.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else _json_object(patterns)
    by_layer = {name: number for name, value in patterns.items() if (number := _number(value)) is not None}
    rank = _first(settings, _RANK)
    return Scaling(
        _first(settings, _ALPHA),
        by_layer,
        int(rank) if rank else None,
        _true(settings.get("use_rslora")),
        "peft_type" in settings,
        str(settings.get("use_cayley_neumann")).lower() == "false",
    )


def _json_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        return {}
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    return next((number for name in names if (number := _number(settings.get(name))) is not None), None)


def _number(value: Any) -> float | None:
    """A finite number, also one in a string; sd-scripts writes "None" where it has none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _true(value: Any) -> bool:
    return str(value).lower() in ("true", "1")
