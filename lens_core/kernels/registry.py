"""Which kernels run: declared limits decide, a self-test at first use confirms, and a refusal is said once.

Nothing here is decided by catching an exception in the middle of a run: a backend that refuses says why
before anything is computed, and the plain-PyTorch definition always remains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..quant import FORMATS
from . import backend, eager
from .backend import apart
from .bank import Bank, PackedMatrices
from .plan import AttentionPlan, Block

log = logging.getLogger(__name__)

# The largest e8m0 byte that the Triton kernels decode exactly: they multiply by 2^(byte - 1) in bf16.
LARGEST_SCALE = 128


@dataclass(frozen=True)
class Kernels:
    """One backend's operations; signatures and meaning are those of ``kernels.eager``."""

    name: str
    add_norm: Callable[..., tuple[Tensor, Tensor | None]]
    attention: Callable[..., Tensor]
    route: Callable[..., tuple[Tensor, Tensor]]
    experts: Callable[[Tensor, Tensor, Tensor, Bank], Tensor]


EAGER = Kernels("torch", eager.add_norm, eager.attention, eager.route, eager.experts)


def choose(device: torch.device, dtype: torch.dtype, bank: Bank, largest_scale: int = 0) -> Kernels:
    """The fastest backend for ``bank`` on ``device`` in ``dtype``; ``largest_scale`` of all e8m0 bytes."""
    if backend.why_no_gpu(device) is not None:
        return EAGER
    reason = why_not_triton(device, dtype, bank, largest_scale)
    if reason is None:
        return triton_kernels()
    _say_once(reason)
    return EAGER


def why_not_triton(
    device: torch.device, dtype: torch.dtype, bank: Bank, largest_scale: int = 0
) -> str | None:
    """The first limit that is not met, in words; None where all are."""
    experts, hidden = bank.down.bias.shape
    inner = bank.gate_up.bias.shape[1] // 2
    reason = backend.why_no_triton(device, dtype, "the encoder")
    if reason is not None:
        return reason
    if experts & (experts - 1):
        return f"{experts} experts are not a power of two"
    if hidden % 32 or inner % 32:
        return f"sizes {hidden} and {inner} are not multiples of 32"
    if largest_scale > LARGEST_SCALE:
        return f"a scale byte is {largest_scale}, and they take {LARGEST_SCALE} at most"
    form = bank.gate_up.format.name if isinstance(bank.gate_up, PackedMatrices) else "mxfp4"
    return _self_test(str(device), dtype, form, experts)


@cache
def triton_kernels() -> Kernels:
    """The Triton backend; import only once its limits are met."""
    from .triton import launch

    return Kernels("triton", launch.add_norm, launch.attention, launch.route, launch.experts)


@cache
def _self_test(device: str, dtype: torch.dtype, format_name: str, experts: int) -> str | None:
    """Run a small layer's operations on both backends; None where they agree, else what happened."""
    if backend.interpreted():
        return None
    return backend.self_test(lambda: difference(torch.device(device), dtype, format_name, experts))


def difference(device: torch.device, dtype: torch.dtype, format_name: str, experts: int) -> float:
    """The largest relative L2 between the backends' operations, each on the same random input."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    bank = random_bank(experts, 352, 320, format_name, generator, device)
    x, weight, bias = normal(100, 352), normal(experts, 352), normal(experts)
    chosen, routing = eager.route(x, weight, bias, 4)
    update = eager.experts(x, chosen, routing, bank)
    got, want = triton_kernels(), EAGER
    return max(
        apart(kernel(*arguments), definition(*arguments))
        for kernel, definition, arguments in (
            (got.add_norm, want.add_norm, (x.float(), x.unsqueeze(1), weight[0], 1e-5, dtype)),
            (got.add_norm, want.add_norm, (x.float(), update, None, 1e-5, dtype)),
            (got.route, want.route, (x, weight, bias, 4)),
            (got.experts, want.experts, (x, chosen, routing, bank)),
            (got.attention, want.attention, _queries_and_keys(normal)),
        )
    )


def _queries_and_keys(normal: Callable[..., Tensor]) -> tuple:
    """Arguments of attention: prompts of 60 and 40 tokens after a prefix, with the published model's heads,
    so that what is compiled here serves there too."""
    blocks = (Block(0, 0, 60, True), Block(60, 60, 100, True))
    positions = torch.cat([torch.arange(97, 157), torch.arange(97, 137)])
    q, k, v = normal(100, 64, 64), normal(100, 8, 64), normal(100, 8, 64)
    past, sinks = normal(2, 97, 8, 64), normal(64)
    angle = positions.to(q.device)[:, None] * torch.linspace(1, 1e-4, 32, device=q.device)
    plan = AttentionPlan(blocks, positions, torch.stack([angle.cos(), angle.sin()]), 97, 128, q.dtype)
    return q, k, v, past, sinks, plan, True


def random_bank(
    experts: int,
    hidden: int,
    inner: int,
    format_name: str,
    generator: torch.Generator,
    device: torch.device | str,
) -> Bank:
    """A bank of random codes, in a trained one's range of scales (matrices of about 1 / sqrt(hidden))."""
    form = FORMATS[format_name]
    # e8m0 bytes around 2^-6; e4m3 bytes from 0.25 to 2 under a factor that brings them there.
    low, high = (118, 122) if form.group == 32 else (0x28, 0x40)

    def matrices(rows: int, columns: int) -> PackedMatrices:
        def bytes_of(*shape: int, start: int = 0, stop: int = 256) -> Tensor:
            return torch.randint(start, stop, shape, generator=generator, dtype=torch.uint8).to(device)

        blocks = bytes_of(experts, rows, columns // 32, 16)
        scales = bytes_of(experts, rows, columns // form.group, start=low, stop=high)
        scale = None if form.group == 32 else torch.full((experts,), 2.0**-6 / 1.1, device=device)
        bias = torch.randn(experts, rows, generator=generator).to(device, torch.bfloat16)
        return PackedMatrices(blocks, scales, scale, bias, form)

    return Bank(matrices(2 * inner, hidden), matrices(hidden, inner), 1.702, 7.0)


@cache
def _say_once(reason: str) -> None:
    log.warning(
        "The encoder's experts run in plain PyTorch, several times slower than with Triton kernels: %s.",
        reason,
    )
