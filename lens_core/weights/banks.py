"""Expert banks of every format -> the packed buffers of ``encoder.moe.PackedExperts``.

E experts, N rows, K columns, G = K/32 blocks. All work one expert at a time, so that no more than one
expert of the file is in memory beside the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..quant import mxfp4
from .loader import Part, Source, Stored
from .tensor_info import TensorInfo

# The dtypes that are quantised to MXFP4 as they load.
DENSE = ("BF16", "F16", "F32")
_ROW_TILE, _COLUMN_TILE = 128, 4
_GGUF_BLOCK = 17
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
Shape3 = tuple[int, int, int]


class ExpertQuantizer:
    """Quantises dense experts to MXFP4 on ``device`` and remembers the largest error that it made."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.largest_error = 0.0

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [N, K] -> blocks u8 [N, G, 16], scales u8 [N, G], on the CPU."""
        weight = weight.to(self.device).contiguous().float()
        blocks, scales = mxfp4.quantize(weight)
        got = mxfp4.dequantize(blocks, scales, torch.float32)
        if not torch.equal(got, weight):
            error = got.sub_(weight).abs_().unflatten(-1, (-1, mxfp4.BLOCK)).amax(-1)
            largest = weight.abs().unflatten(-1, (-1, mxfp4.BLOCK)).amax(-1)
            relative = (error / largest.clamp_min_(1e-30)).max().item()
            self.largest_error = max(self.largest_error, relative)
        return blocks.cpu(), scales.cpu()


def dense_bank(name: str, shape: Shape3, quantize: ExpertQuantizer, *, transposed: bool) -> Part:
    """A bank in plain numbers: transformers' ``name`` [E, K, N] if ``transposed``, else ComfyUI's
    ``name.weight`` [E, N, K]."""
    experts, rows, columns = shape
    stored = (experts, columns, rows) if transposed else shape

    def make(sources: Sequence[Source], dtype: torch.dtype | None) -> Sequence[Tensor]:
        blocks, scales = _empty(shape)
        for expert in range(experts):
            weight = sources[0].info.values(expert, expert + 1)[0]
            blocks[expert], scales[expert] = quantize(weight.t() if transposed else weight)
        return blocks, scales

    stored_name = name if transposed else f"{name}.weight"
    return Part((Stored(stored_name, (stored,), DENSE),), (f"{name}_blocks", f"{name}_scales"), make)


def nvfp4_bank(name: str, shape: Shape3, *, exact: bool) -> Part:
    """A bank in ComfyUI's nvfp4; ``exact`` says that its scales are MXFP4's in another dress (see
    ``is_mxfp4``), as which it is then loaded."""
    experts, rows, columns = shape
    groups = columns // 16
    tiles = (_padded(rows, _ROW_TILE), _padded(groups, _COLUMN_TILE))
    flat = math.prod(tiles)
    stored = (
        Stored(f"{name}.weight", ((experts, rows, columns // 2),), ("U8",)),
        Stored(
            f"{name}.weight_scale",
            ((experts, *tiles), (experts, flat), (experts, tiles[0] // 4, tiles[1] * 4)),
            ("F8_E4M3", "U8"),
        ),
        Stored(f"{name}.weight_scale_2", ((experts,), (), (1,)), ("F32",)),
        Stored(f"{name}.comfy_quant", (), ("U8",)),
    )

    def make(sources: Sequence[Source], dtype: torch.dtype | None) -> Sequence[Tensor]:
        weight, tiled, factor = sources[:3]
        factors = expert_factors(factor.info, experts)
        blocks = torch.empty(experts, rows, columns // 32, 16, dtype=torch.uint8)
        scales = torch.empty(experts, rows, groups // 2 if exact else groups, dtype=torch.uint8)
        for expert in range(experts):
            packed = weight.info.bytes(expert, expert + 1).view(blocks.shape[1:])
            torch.bitwise_or(packed << 4, packed >> 4, out=blocks[expert])
            e4m3 = unblocked(tiled.info.bytes(expert, expert + 1), rows, groups)
            scales[expert] = _as_e8m0(e4m3, factors[expert].item()) if exact else e4m3
        return (blocks, scales) if exact else (blocks, scales, factors)

    parts = ("blocks", "scales") if exact else ("blocks", "scales", "scale")
    return Part(stored, tuple(f"{name}_{part}" for part in parts), make)


def expert_factors(info: TensorInfo, experts: int) -> Tensor:
    """An nvfp4 bank's fp32 factors [E]; one for the whole bank is repeated."""
    return info.values().clone().flatten().expand(experts).contiguous()


def unblocked(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in cuBLAS' tiled order, u8 of any shape -> [rows, columns], without the padding.

    A tile is 128 rows by 4 columns; in it, row r + 32 q (r < 32, q < 4) lies at [r, q].
    """
    across = _padded(columns, _COLUMN_TILE) // _COLUMN_TILE
    tiled = tiles.reshape(-1, across, 32, 4, _COLUMN_TILE).permute(0, 3, 2, 1, 4)
    return tiled.reshape(-1, across * _COLUMN_TILE)[:rows, :columns]


def is_mxfp4(scales: TensorInfo, factors: TensorInfo, shape: Shape3) -> bool:
    """Whether an nvfp4 bank holds exactly what an MXFP4 one could: every scale a power of two, and
    the same for both halves of 32 values.

    Reads all scales, one expert at a time; the first that is otherwise ends it.
    """
    experts, rows, columns = shape
    for expert, factor in enumerate(expert_factors(factors, experts).tolist()):
        e4m3 = unblocked(scales.bytes(expert, expert + 1), rows, columns // 16)
        if not torch.equal(e4m3[:, 0::2], e4m3[:, 1::2]):
            return False
        used = torch.bincount(e4m3.flatten(), minlength=256).nonzero().flatten()
        if (_e8m0_table(factor)[used] == 0).any():
            return False
    return True


def gguf_banks(prefix: str, hidden: int, inner: int, experts: int, quantize: ExpertQuantizer) -> list[Part]:
    """The banks of a layer in llama.cpp's split: gate, up and down, and the biases of gate and up."""

    def weights(sources: Sequence[Source], dtype: torch.dtype | None) -> Sequence[Tensor]:
        # Gate and up alternate by row in the module.
        rows = sum(source.info.shape[1] for source in sources)
        blocks, scales = _empty((experts, rows, sources[0].info.shape[2]))
        for expert in range(experts):
            for index, source in enumerate(sources):
                where = (expert, slice(index, None, len(sources)))
                blocks[where], scales[where] = _gguf_expert(source.info, expert, quantize)
        return blocks, scales

    def biases(sources: Sequence[Source], dtype: torch.dtype | None) -> Sequence[Tensor]:
        return [torch.stack([source.read(dtype) for source in sources], dim=-1).flatten(-2)]

    kinds = ("MXFP4", *DENSE)
    wide, tall = (experts, inner, hidden), (experts, hidden, inner)
    pair = tuple(Stored(f"{prefix}.{name}.weight", (wide,), kinds) for name in ("gate", "up"))
    pair_bias = tuple(Stored(f"{prefix}.{name}.bias", ((experts, inner),)) for name in ("gate", "up"))
    down = (Stored(f"{prefix}.down.weight", (tall,), kinds),)
    gate_up_targets = tuple(f"{prefix}.gate_up_proj_{part}" for part in ("blocks", "scales"))
    down_targets = tuple(f"{prefix}.down_proj_{part}" for part in ("blocks", "scales"))
    return [
        Part(pair, gate_up_targets, weights),
        Part(pair_bias, (f"{prefix}.gate_up_proj_bias",), biases),
        Part(down, down_targets, weights),
    ]


def _gguf_expert(info: TensorInfo, expert: int, quantize: ExpertQuantizer) -> tuple[Tensor, Tensor]:
    """One expert of a GGUF tensor -> blocks u8 [N, G, 16], scales u8 [N, G].

    A block of type MXFP4 is a scale byte and 16 bytes of which byte j holds value j low and j + 16
    high. Its values count double and its scales half of ours, so the same bytes mean the same numbers.
    """
    if info.dtype != "MXFP4":
        return quantize(info.values(expert, expert + 1)[0])
    raw = info.bytes(expert, expert + 1).view(info.shape[1], -1, _GGUF_BLOCK)
    # Eight bytes at a time: codes 0..15 from the low nibbles, 16..31 from the high ones; then each two
    # neighbours become one byte, the lower of the 16 bits that they fill.
    words = raw[..., 1:].contiguous().view(torch.int64)
    codes = torch.stack([words & _LOW_NIBBLES, (words >> 4) & _LOW_NIBBLES], dim=-2).view(torch.int16)
    return (codes | (codes >> 4)).to(torch.uint8).flatten(-2), raw[..., 0]


def _empty(shape: Shape3) -> tuple[Tensor, Tensor]:
    experts, rows, columns = shape
    groups = columns // mxfp4.BLOCK
    blocks = torch.empty(experts, rows, groups, 16, dtype=torch.uint8)
    return blocks, torch.empty(experts, rows, groups, dtype=torch.uint8)


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _as_e8m0(e4m3: Tensor, factor: float) -> Tensor:
    """Scale bytes [N, K/16] of an exact bank -> MXFP4's [N, G]."""
    codes = e4m3[:, 0::2]
    return _e8m0_table(factor).index_select(0, codes.flatten().int()).view(codes.shape)


def _e8m0_table(factor: float) -> Tensor:
    """u8 [256]: for each e4m3 byte, the scale byte of its product with ``factor``; 0 where the
    product is no power of two that MXFP4 has."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double() * factor
    mantissa, exponent = torch.frexp(values)
    fits = (mantissa == 0.5) & (exponent > -126) & (exponent <= 128)
    return torch.where(fits, exponent + 126, 0).to(torch.uint8)
