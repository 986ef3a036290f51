"""Kernels launched straight, compiled once: the same bits as by Triton's own launch, on any stream and from
any thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.kernels import block_registry
from lens_core.kernels.block import Rows
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import int8
from tests.core import quantized_cases as cases

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
HIDDEN = 1536
# Image and text tokens: the first is compiled for, and more, fewer, odd and even ones follow.
SIZES = [(4096, 200), (1024, 16), (37, 0), (1, 1), (999, 333), (8100, 7), (128, 128)]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """What is kept of each kernel; nothing of earlier tests."""
    from lens_core.kernels.triton import launcher

    found: dict[Any, Any] = {}
    monkeypatch.setattr(launcher, "_compiled", found)
    with torch.inference_mode():
        yield found


def normal(*shape: int) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=CUDA).bfloat16()


def streams(size: tuple[int, int]) -> list[Tensor]:
    return [normal(1, count, HIDDEN) for count in size if count]


def weights() -> list[quant.Packed]:
    """Of image and text."""
    return [quant.quantize(normal(width, HIDDEN)[:4608].float(), int8) for width in (4608, 4609)]


def work(size: tuple[int, int], packed: Sequence[quant.Packed]) -> list[Tensor]:
    """Most of a block's kernels, each with the results of that before."""
    from lens_core.kernels.triton import linear_launch

    fast = block_registry.triton_block_kernels()
    x = streams(size)
    table, count = normal(1, 6 * HIDDEN), len(x)
    rows = [Rows(part, part.flip(1), table, table[0, :HIDDEN], 1e-6, table) for part in x]
    totals, normed = fast.add_modulate(rows, 2, 3, "int8")
    out = linear_launch.multiply(normed, packed[:count], [None] * count)
    again = linear_launch.multiply(
        linear_launch.quantize_rows(totals, "int8"), packed[:count], [None] * count
    )
    gated = fast.swiglu([part.clone() for part in out], again)
    plain = linear_launch.unpack(packed[:count], torch.bfloat16)
    return [*totals, *out, *again, *gated, *plain]


def by_triton(size: tuple[int, int], packed: Sequence[quant.Packed], monkeypatch) -> list[Tensor]:
    """The same without what is kept."""
    from lens_core.kernels.triton import block_launch, linear_launch

    def launch(
        function: Any, grid: Any, operands: Any, constants: Any, num_warps: int, **options: Any
    ) -> None:
        function[tuple(grid)](*operands, **constants, num_warps=num_warps, **options)

    with monkeypatch.context() as patch:
        for module in (block_launch, linear_launch):
            patch.setattr(module, "launch", launch)
        return work(size, packed)


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_launches_are_those_of_triton(compiled: dict, monkeypatch: pytest.MonkeyPatch):
    """Whatever sizes come after those that it was compiled for."""
    packed = weights()
    work(SIZES[0], packed)
    work((37, 5), packed)  # the smaller tile
    kernels = len(compiled)
    assert kernels == 6  # quantize_rows, add_modulate, swiglu, unpack; two tiles
    for size in SIZES:
        want = by_triton(size, packed, monkeypatch)
        for _ in range(2):
            assert same(work(size, packed), want), size
    assert len(compiled) == kernels, "all were launched straight"


def test_pointers_at_other_addresses(compiled: dict):
    """Before and after aligned ones: each has a kernel for it."""
    from lens_core.kernels.triton import linear_launch

    x = normal(1, 333, HIDDEN)
    (want,) = linear_launch.quantize_rows([x], "int8")
    for given in (cases.shifted(x), x, cases.shifted(x), x, x[:, 1:]):
        kept = len(compiled)
        (got,) = linear_launch.quantize_rows([given.contiguous()], "int8")
        tokens = given.shape[1]
        assert torch.equal(got.scale, want.scale[:, -tokens:])
        cases.assert_nearest(got, given.double(), "int8", slack=0)
        assert len(compiled) <= kept + (given.data_ptr() % 16 == 0)
    assert len(compiled) == 1


def test_a_launch_goes_to_the_current_stream():
    """Behind what is already there: inputs that come late are waited for."""
    packed = weights()
    want = work((999, 333), packed)
    x = streams((999, 333))
    from lens_core.kernels.triton import linear_launch

    (right,) = linear_launch.quantize_rows(x[:1], "int8")
    late = torch.zeros_like(x[0])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        late.copy_(x[0])
        (got,) = linear_launch.quantize_rows([late], "int8")
        others = work((999, 333), packed)
    side.synchronize()
    assert torch.equal(got.values, right.values) and torch.equal(got.scale, right.scale)
    assert same(others, want)


@pytest.mark.parametrize("warm", [False, True], ids=["compiled by several at once", "compiled before"])
def test_threads_with_streams_of_their_own(warm: bool, compiled: dict):
    packed = weights()
    want = {size: [x.cpu() for x in work(size, packed)] for size in SIZES}
    torch.cuda.synchronize()
    if not warm:
        compiled.clear()

    def run(size: tuple[int, int]) -> bool:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            found = [work(size, packed) for _ in range(10)]
            torch.cuda.current_stream().synchronize()
            return all(same([x.cpu() for x in results], want[size]) for results in found)

    with ThreadPoolExecutor(len(SIZES)) as threads:
        assert all(threads.map(run, SIZES))
    assert len(compiled) == 6
