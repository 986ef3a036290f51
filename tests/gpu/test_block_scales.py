"""mxfp8 and nvfp4 at the published sizes: the kernel against its definition, and that it is the one used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_core.kernels import EAGER_LINEAR, choose_linear
from lens_core.kernels.linear import linears
from lens_core.quant import kitchen
from lens_core.quant import linear as quant
from lens_core.quant.linear import Packed
from tests.compare import relative_l2
from tests.core import quantized_cases as cases

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
SHAPES = ((4608, 1536), (1536, 1536), (4096, 1536), (1536, 4096), (96, 96))
NAMES = ("mxfp8", "nvfp4")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def pair(n: int, k: int, name: str) -> list[Packed]:
    """Two random weights, neither of which asks for quantised inputs where the GPU has the format."""
    made = [cases.block_scaled(n, k)[name] for _ in range(2)]
    return [Packed(packed.form, *(None if x is None else x.to(CUDA) for x in packed[1:])) for packed in made]


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0), want.nan_to_num(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_weights(n: int, k: int, name: str):
    kernels = choose_linear(CUDA, torch.bfloat16)
    assert kernels.name == "triton"
    weights = pair(n, k, name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for got, packed in zip(kernels.unpack(weights, dtype), weights, strict=True):
            assert got.dtype == dtype and got.isfinite().all()
            assert torch.equal(got, quant.unpack(packed, dtype)), "one fp32 product, rounded to nearest"


def test_every_8_bit_float_and_power_of_2():
    """Products below fp32's normal numbers too: the GPU does not take them for zero."""
    kernels = choose_linear(CUDA, torch.bfloat16)
    values = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(32, 1).view(torch.float8_e4m3fn)
    scale = torch.zeros(256, 4, dtype=torch.uint8)
    scale[:, 0] = torch.arange(256)
    packed = Packed(cases.mxfp8, values, cases.blocked(scale))
    want = quant.unpack(packed, torch.float32)
    there = packed._replace(values=values.to(CUDA), scale=packed.scale.to(CUDA))
    assert same(kernels.unpack([there], torch.float32)[0].cpu(), want)


@pytest.mark.parametrize("name", NAMES)
def test_linears_round_no_worse_than_their_definitions(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kitchen, "multiplies", lambda *_: False)
    kernels = choose_linear(CUDA, torch.bfloat16)
    weights = pair(4608, 1536, name)
    streams = [torch.randn(1, tokens, 1536, device=CUDA, dtype=torch.bfloat16) for tokens in (4096, 200)]
    ours, theirs = (linears(streams, weights, [None, None], way) for way in (kernels, EAGER_LINEAR))
    for got, want, x, packed in zip(ours, theirs, streams, weights, strict=True):
        exact = x.double() @ quant.unpack(packed, torch.float32).double().T
        # The same bf16 weights in the same product.
        assert relative_l2(got, exact) < 1.001 * relative_l2(want, exact)


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_is_as_fast_as_memory_allows(name: str):
    """A third of the bandwidth of copying, at least: comfy-kitchen's takes ten times as long."""
    kernels = choose_linear(CUDA, torch.bfloat16)
    weights = pair(4608, 1536, name)
    source = torch.empty(2 * 4608, 1536, device=CUDA, dtype=torch.bfloat16)
    unpacking = seconds(lambda: kernels.unpack(weights, torch.bfloat16))
    copying = seconds(lambda: source.clone())
    print(f"{unpacking * 1e6:.0f} us, a copy of the result {copying * 1e6:.0f} us")
    assert unpacking < 3 * copying


def seconds(run) -> float:
    """Of 50 calls in a graph, so that their launches do not count."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(50):
            run()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 50e3)
    return min(times)
