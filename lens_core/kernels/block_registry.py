"""Which kernels the denoiser's blocks run on: declared limits decide, and a self-test at first use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..quant.layer_format import FLOAT8, INT8
from ..quant.linear import QuantizedRows, dequantize_rows
from . import backend, block
from .block import HeadNorms, Inputs, Rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockKernels:
    """One backend's operations; signatures and meaning are those of ``kernels.block``."""

    name: str
    add_modulate: Callable[..., tuple[list[Tensor], list[Inputs]]]
    joint_heads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    swiglu: Callable[..., list[Inputs]]
    # None where PyTorch's attention after joint_heads is as fast.
    attend: Callable[..., list[Tensor]] | None = None


EAGER_BLOCK = BlockKernels("torch", block.add_modulate, block.joint_heads, block.swiglu)


@cache
def choose_block(device: torch.device, dtype: torch.dtype, head_dim: int) -> BlockKernels:
    """The fastest backend on ``device`` in ``dtype``; why it is not Triton on a GPU is logged once."""
    if backend.why_no_gpu(device) is not None:
        return EAGER_BLOCK
    reason = why_not_triton_block(device, dtype, head_dim)
    if reason is None:
        kernels = triton_block_kernels()
        return kernels if attends(device, dtype) else replace(kernels, attend=None)
    log.warning(
        "The denoiser runs in plain PyTorch between its matrix products, slower than with Triton: %s.",
        reason,
    )
    return EAGER_BLOCK


def why_not_triton_block(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The first limit that is not met, in words; None where all are."""
    reason = backend.why_no_triton(device, dtype, "the denoiser")
    if reason is None and (head_dim & (head_dim - 1) or head_dim < 4):
        reason = f"a head has {head_dim} channels, and they take powers of two"
    if reason is None and not backend.interpreted():
        reason = backend.self_test(lambda: difference(device, dtype, head_dim))
    return reason


def attends(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention by Triton is right in ``dtype`` (fp16 would overflow) and known to be faster."""
    return why_not_attend(device, dtype) is None


def why_not_attend(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why PyTorch's attention is used instead, in words; None where ours is.

    AMD's GPUs number their generations otherwise, and their compiler has not all of the kernel's options.
    """
    if dtype != torch.bfloat16:
        return f"the denoiser computes in {str(dtype).removeprefix('torch.')}, and it takes bfloat16"
    if torch.version.hip is not None or (
        device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9
    ):
        return "it is known to be faster than PyTorch's on Hopper alone (compute capability 9)"
    return None


@cache
def triton_block_kernels() -> BlockKernels:
    """The Triton backend; import only once its limits are met."""
    from .triton import block_launch

    return BlockKernels(
        "triton",
        block_launch.add_modulate,
        block_launch.joint_heads,
        block_launch.swiglu,
        block_launch.attend,
    )


def difference(device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The largest relative L2 between the backends' operations, each on the same random input."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    heads = 24  # the published model's, so that what is compiled here serves there too
    hidden = heads * head_dim
    tables = [normal(2, block.PARTS * hidden) for _ in range(4)]
    rows = [  # image and text
        Rows(normal(2, tokens, hidden), normal(2, tokens, hidden), before, normal(hidden), 1e-6, after)
        for tokens, before, after in ((37, tables[0], tables[1]), (5, tables[2], tables[3]))
    ]
    angle = torch.randn(42, head_dim // 2, generator=generator).to(device)
    rotary = torch.stack([angle.cos(), angle.sin()])
    norms = [HeadNorms(1 + normal(head_dim) / 4, 1 + normal(head_dim) / 4, 1e-6) for _ in range(2)]
    qkv = [normal(2, tokens, 3 * hidden) for tokens in (37, 5)]
    entering = [row._replace(update=None) for row in rows[:1]]
    leaving = [row._replace(weight=None) for row in rows]
    joint = (block.MLP_GATE, block.ATTENTION_SHIFT)  # where one block ends and the next begins

    def run(kernels: BlockKernels) -> tuple[Inputs, ...]:
        totals, normed = kernels.add_modulate(rows, *joint)
        both = kernels.joint_heads([x.clone() for x in qkv], norms, rotary)
        image = kernels.joint_heads([qkv[0].clone()], norms[:1], rotary[:, :37].contiguous())
        gated = kernels.swiglu([x.clone() for x in qkv], qkv)
        _, entered = kernels.add_modulate(entering, *joint)
        left, _ = kernels.add_modulate(leaving, *joint)
        middle, middle_normed = kernels.add_modulate(rows, block.ATTENTION_GATE, block.MLP_SHIFT)
        added = (*totals, *normed, *entered, *left, *middle, *middle_normed)
        if not attends(device, dtype):
            return (*added, *both, *image, *gated)
        attend = kernels.attend or block.attend
        seen = attend([x.clone() for x in qkv], norms, rotary, False)
        seen_by_image = attend([qkv[0].clone()], norms[:1], rotary[:, :37].contiguous(), True)
        return (*added, *both, *image, *gated, *seen, *seen_by_image)

    kinds = [INT8] if backend.why_no_float8(device) else [INT8, FLOAT8]
    return max(
        backend.apart(_in_full(run(triton_block_kernels())), _in_full(run(EAGER_BLOCK))),
        *(quantized_difference(kind, rows, qkv) for kind in kinds),
    )


def quantized_difference(kind: str, rows: Sequence[Rows], gates: Sequence[Tensor]) -> float:
    """How far norms and gates in 8 bits are from fp32 beside what quantisation itself takes, as relative L2.

    Not how far from the definitions': where these round to 16 bits first, numbers fall to the other side.
    """

    def run(kernels: BlockKernels, dtype: torch.dtype, *kinds: str) -> tuple[Tensor, ...]:
        streams = [
            row._replace(**{name: x.to(dtype) for name, x in row._asdict().items() if name != "eps"})
            for row in rows
        ]
        _, normed = kernels.add_modulate(streams, block.MLP_GATE, block.ATTENTION_SHIFT, *kinds)
        gated = kernels.swiglu([x.to(dtype, copy=True) for x in gates], [x.to(dtype) for x in gates], *kinds)
        return _in_full([*normed, *gated])

    exact = run(EAGER_BLOCK, torch.float32)
    ours, theirs = (
        [
            backend.apart(got, want)
            for got, want in zip(run(kernels, gates[0].dtype, kind), exact, strict=True)
        ]
        for kernels in (triton_block_kernels(), EAGER_BLOCK)
    )
    return max(0.0, *(mine**2 - other**2 for mine, other in zip(ours, theirs, strict=True))) ** 0.5


def _in_full(outputs: Sequence[Inputs]) -> tuple[Tensor, ...]:
    return tuple(dequantize_rows(x) if isinstance(x, QuantizedRows) else x for x in outputs)
