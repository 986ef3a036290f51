"""Quantised layers of a denoiser's file: which there are, in which format, and their way into a module.

ComfyUI's files, its older ones, SDNQ's folders, and GGUF. Read from the header and the few bytes that name
the formats.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

from ..config import is_modulation
from ..quant.linear import Packed
from .comfy_quant import comfy_layers, scaled_layers, unscaled_layers
from .gguf import GgufCheckpoint
from .gguf_linear import TYPES, empty, gguf_layers, repack
from .loader import AnyCheckpoint, Shape, Source, Stored
from .quantized_part import Linears, QuantizedPart
from .sdnq import sdnq_layers

log = logging.getLogger(__name__)
# What other programs' files have beside a quantised weight; scales of inputs are found from these anew.
UNUSED = (r"\.input_scale$", r"\.scale_input$", r"^scaled_fp8$")


def stored_layers(
    checkpoint: AnyCheckpoint, source: Mapping[str, str], sizes: Mapping[str, Shape]
) -> dict[str, QuantizedPart]:
    """The quantised linears of a file by name; none in one that is not quantised.

    ``source`` gives the stored name of each tensor (``keymap.rename``, ``UNUSED`` ones too), ``sizes`` the
    linears' [N, K].
    """
    linears = Linears(checkpoint, source, sizes)
    if isinstance(checkpoint, GgufCheckpoint):
        layers = _gguf(checkpoint, linears)
        bits = {name: (TYPES[part.called].bits, part.called) for name, part in layers.items()}
    else:
        layers = comfy_layers(linears) or scaled_layers(linears) or sdnq_layers(linears)
        layers |= unscaled_layers(linears, layers)
        bits = {name: (part.packed.form.bits, part.called) for name, part in layers.items()}
    warn_coarse(checkpoint, bits)
    return layers


def _gguf(checkpoint: GgufCheckpoint, linears: Linears) -> dict[str, QuantizedPart]:
    layers = {}
    for name, (_, kind) in gguf_layers(checkpoint, linears.source).items():
        size = linears.size(name)
        stored = (Stored(f"{name}.weight", (size,), (kind,)),)
        make = partial(_repack, layer=name)
        layers[name] = QuantizedPart(empty(size, kind, "meta"), stored, make, kind)
    return layers


def _repack(sources: Sequence[Source], layer: str) -> Packed:
    return repack(sources[0].info, layer)


def warn_coarse(checkpoint: AnyCheckpoint, bits: Mapping[str, tuple[int, str]]) -> list[str]:
    """Modulation layers below 8 bits, of layers with their bits and what their format is called; warns of
    them."""
    coarse = [name for name, (count, _) in bits.items() if is_modulation(name) and count < 8]
    if coarse:
        log.warning(
            "%s: %d modulation layers have fewer than 8 bits (the first is %s in %s). They set shift, scale "
            "and gate of every token, and so coarse they can put a grid on pictures; choose a file that has "
            "them in 8 bits or more, such as q8_0.",
            checkpoint.name,
            len(coarse),
            coarse[0],
            bits[coarse[0]][1],
        )
    return coarse
