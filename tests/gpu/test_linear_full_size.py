"""Kernels of quantised linears at the published sizes, against fp64 and their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lens_core.kernels import EAGER_LINEAR, backend, block_registry, choose_linear, linear_registry
from lens_core.kernels.block import Rows
from lens_core.kernels.linear import linear, multiply
from lens_core.kernels.scaled_mm import multiply_float8
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import LayerFormat, affine4, float8, int8
from lens_core.quant.linear import Packed, QuantizedRows
from tests.compare import relative_l2
from tests.core import block_formulas as formulas
from tests.core import quantized_cases as cases

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
# Image alone, or image and text: few, many, and more text than image.
TOKENS = ((4096,), (8100,), (200,), (37,), (4096, 200), (1024, 37), (37, 333), (5900, 99), (8100, 512))
SHAPES = ((4608, 1536), (1536, 1536), (4096, 1536), (1536, 4096))  # [N, K] of a block's layers
BIASED = SHAPES[:2]
HIDDEN, INNER = 1536, 4096
# An approximate reciprocal root (2^-22), exponential and quotient before a row is quantised.
SLACK = 1e-5
LUCK = 1.1
# bf16 rounds by 1.7e-3 in the mean; sums of fewer bits than fp32's may add as much.
FLOAT8 = 4e-3
FORMS = {"int8": int8, "float8": float8}


@pytest.fixture(scope="module", autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=["int8", "float8"])
def kind(request: pytest.FixtureRequest) -> str:
    reason = backend.why_no_float8(CUDA) if request.param == "float8" else None
    if reason is not None:
        pytest.skip(reason)
    return request.param


def launch():
    from lens_core.kernels.triton import linear_launch

    return linear_launch


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=CUDA).to(dtype)


def layer(n: int, k: int, kind: str, one_scale: bool = False) -> tuple[Packed, Tensor | None]:
    """A weight whose rows differ in size, and a bias where the model has one."""
    wide = normal(n, k, dtype=torch.float32) * torch.linspace(0.01, 0.05, n, device=CUDA)[:, None]
    packed = quant.quantize(wide, FORMS[kind].dynamic(True))
    if kind == "int8" and one_scale:
        packed = packed._replace(scale=packed.scale.mean())
    if kind == "float8" and not one_scale:
        packed = packed._replace(scale=packed.scale * torch.linspace(0.5, 1, n, device=CUDA)[:, None])
    return packed, normal(n) if (n, k) in BIASED else None


def layers(
    tokens: Sequence[int], n: int, k: int, kind: str, one_scale: bool = False, batch: int = 1
) -> list[cases.Layer]:
    """Streams [B, T, K] and a layer of each, in nothing alike."""
    found = []
    for index, count in enumerate(tokens):
        packed, bias = layer(n, k, kind, one_scale)
        if index:
            packed = packed._replace(values=packed.values.flip(0), scale=packed.scale * 0.7)
            bias = None if bias is None else bias.flip(0)
        x = quant.quantize_rows(normal(batch, count, k), kind)
        found.append(cases.Layer(x, packed, bias))
    return found


def apart(layers: Sequence[cases.Layer]) -> tuple[list[QuantizedRows], list[Packed], list[Tensor | None]]:
    """Streams, weights and biases."""
    return [x for x, _, _ in layers], [packed for _, packed, _ in layers], [bias for _, _, bias in layers]


def on_gpu(packed: Packed) -> Packed:
    return Packed(packed.form, *(None if x is None else x.to(CUDA) for x in packed[1:]))


@pytest.mark.parametrize("width", [HIDDEN, INNER, 341])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_rows(tokens: tuple[int, ...], width: int, kind: str):
    streams = [normal(2, count, width) for count in tokens]
    for got, x in zip(launch().quantize_rows(streams, kind), streams, strict=True):
        want = quant.quantize_rows(x, kind)
        cases.assert_nearest(got, x.double(), kind, slack=0)
        ours, theirs = (relative_l2(quant.dequantize_rows(rows), x) for rows in (got, want))
        print(f"{ours:.3e}, the definition {theirs:.3e}")
        assert ours < 1.001 * theirs


@pytest.mark.parametrize("move", [cases.shifted, cases.spread])
def test_rows_and_products_of_tensors_anywhere(move: Callable[[Tensor], Tensor], kind: str):
    """At no multiple of 16 bytes, or no two numbers side by side: to the bit the same."""
    streams = [normal(2, count, HIDDEN) for count in (1000, 37)]
    want = launch().quantize_rows(streams, kind)
    product = choose_linear(CUDA, torch.bfloat16).multiply[kind]
    held = layers((1000, 37), 4608, HIDDEN, kind, batch=2)
    out = product(*apart(held))
    for which in ([0], [1], [0, 1]):
        put = [move(x) if index in which else x for index, x in enumerate(streams)]
        for got, same in zip(launch().quantize_rows(put, kind), want, strict=True):
            assert torch.equal(got.values.float(), same.values.float()) and torch.equal(got.scale, same.scale)
        moved = [
            cases.Layer(
                x._replace(values=move(x.values), scale=move(x.scale)), cases.with_tensors(packed, move), bias
            )
            if index in which
            else cases.Layer(x, packed, bias)
            for index, (x, packed, bias) in enumerate(held)
        ]
        assert all(torch.equal(a, b) for a, b in zip(product(*apart(moved)), out, strict=True))


def test_rows_at_the_ends(kind: str):
    """Rounding to even, zeros, the checkpoint's 1.4e5, infinity and no number, as PyTorch has them."""
    ties = [0.5, 1.5, -2.5, 126.5, 0.0] if kind == "int8" else [17, 19, -34, 38, 420]
    x = torch.tensor([[cases.LARGEST[kind], *ties]], device=CUDA)
    nearest = [0, 2, -2, 126, 0] if kind == "int8" else [16, 20, -32, 40, 416]
    assert launch().quantize_rows([x], kind)[0].values[0, 1:].float().tolist() == nearest
    x = normal(5, HIDDEN) * torch.tensor([[0, 1.4e5, 1e-30, 1, 1]], device=CUDA).T.bfloat16()
    x[3, 7], x[4, 7] = float("nan"), float("inf")
    (got,) = launch().quantize_rows([x], kind)
    cases.assert_nearest(QuantizedRows(*(part[:2] for part in got[:2]), x.dtype), x[:2].double(), kind, 0)
    full = quant.dequantize_rows(got)
    assert full[:3].isfinite().all() and (full[0] == 0).all() and not full[3:, 7].isfinite().any()


@pytest.mark.parametrize("text", [0, 1, 200, 333])
def test_norms_and_gates(text: int, kind: str):
    """Nearest to fp64's, batch 2; totals are those without quantisation, to the bit."""
    fast = block_registry.triton_block_kernels()
    counts = [8100] if text == 0 else [4096, text]
    tables = [normal(2, 48, 2, 6 * HIDDEN)[:, 5, index] for index in (0, 1)]
    rows = [
        Rows(normal(2, n, HIDDEN), normal(2, n, HIDDEN), table, 1 + normal(HIDDEN) / 8, 1e-6, table)
        for n, table in zip(counts, tables, strict=False)
    ]
    totals, normed = fast.add_modulate(rows, 2, 3, kind)
    plain, _ = fast.add_modulate(rows, 2, 3)
    assert all(torch.equal(total, want) for total, want in zip(totals, plain, strict=True))
    for row, total, norm in zip(rows, totals, normed, strict=True):
        cases.assert_nearest(norm, formulas.normed(total, row, 3), kind, SLACK)
    gates, ups = ([normal(2, n, INNER) * size for n in counts] for size in (1, 3))
    for x, gate, up in zip(fast.swiglu(gates, ups, kind), gates, ups, strict=True):
        cases.assert_nearest(x, formulas.gated(gate, up), kind, SLACK)


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_weights(n: int, k: int, group: int):
    for name, pair in cases.pairs(n, k, group).items():
        weights = [on_gpu(held) for held, _ in pair]
        exact = [right.to(CUDA) for _, right in pair]
        for count in (1, 2):
            wide = launch().unpack(weights[:count], torch.float32)
            # The definition's product and sum in fp32, or both at once.
            assert all(relative_l2(*both) < 1e-7 for both in zip(wide, exact, strict=False)), name
            for dtype in (torch.bfloat16, torch.float16):
                for got, right in zip(launch().unpack(weights[:count], dtype), exact, strict=False):
                    assert got.dtype == dtype and got.shape == (n, k)
                    # Sums that the last bit of fp32 takes to the other side of a tie.
                    assert (got != right.to(dtype)).float().mean() < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_8_bit_float(dtype: torch.dtype):
    values = torch.arange(256, dtype=torch.uint8, device=CUDA).view(16, 16).view(dtype)
    (got,) = launch().unpack([Packed(float8, values, torch.ones((), device=CUDA))], torch.float32)
    assert torch.equal(got.nan_to_num(1e9), values.float().nan_to_num(1e9))


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_int8_products_are_exact_but_for_their_rounding(
    tokens: tuple[int, ...], n: int, k: int, one_scale: bool
):
    streams, weights, biases = apart(layers(tokens, n, k, "int8", one_scale))
    halves = [x._replace(dtype=torch.float16) for x in streams]
    found = zip(
        launch().multiply(streams, weights, biases), launch().multiply(halves, weights, biases), strict=True
    )
    for (got, half), *held in zip(found, streams, weights, biases, strict=True):
        exact = cases.exact_product(*held)
        assert got.shape == exact.shape and got.dtype == torch.bfloat16
        # The epilogue's fp32 turns what is next to a tie.
        assert relative_l2(got, exact) < 1.001 * relative_l2(exact.bfloat16(), exact)
        assert half.dtype == torch.float16 and relative_l2(half, exact) < 3e-4  # 2^-12 in the mean


EDGES = ((1, 8, 16), (65, 1544, 336), (131, 24, 1040), (1700, 1496, 272), (6001, 1544, 144), (33, 7, 1536))


@pytest.mark.parametrize("text", [0, 1, 70])
@pytest.mark.parametrize(("tokens", "n", "k"), EDGES)
def test_products_at_the_edges(
    tokens: int, n: int, k: int, text: int, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Sizes that no tile divides, each tile, and nothing written behind a result."""
    counts = (tokens, text) if text else (tokens,)
    held = [layer._replace(bias=normal(n)) for layer in layers(counts, n, k, kind)]
    memory: list[Tensor] = []

    def fenced(_: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        memory.append(torch.full((size + 4096,), 7.0, device=CUDA, dtype=dtype))
        return memory[-1][:size].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", fenced)
        found = launch().multiply(*apart(held))
    for got, around, layer in zip(found, memory, held, strict=True):
        exact = cases.exact_product(*layer)
        rounded = relative_l2(exact.bfloat16(), exact)
        assert relative_l2(got, exact) < (1.001 * rounded if kind == "int8" else FLOAT8)
        assert (around[got.numel() :] == 7).all()


@pytest.mark.parametrize("by", ["PyTorch", "Triton", "the choice"])
@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_float8_products(tokens: tuple[int, ...], n: int, k: int, one_scale: bool, by: str):
    reason = backend.why_no_float8(CUDA)
    if reason is not None:
        pytest.skip(reason)
    ways = {
        "PyTorch": multiply_float8,
        "Triton": launch().multiply,
        "the choice": choose_linear(CUDA, torch.bfloat16).multiply["float8"],
    }
    held = layers(tokens, n, k, "float8", one_scale)
    found = ways[by](*apart(held))
    defined = multiply(*apart(held))
    for got, want, layer in zip(found, defined, held, strict=True):
        exact = cases.exact_product(*layer)
        print(f"{relative_l2(got, exact):.2e}, rounding alone {relative_l2(exact.bfloat16(), exact):.2e}")
        assert got.shape == exact.shape and got.dtype == torch.bfloat16
        assert relative_l2(got, exact) < FLOAT8
        # Beside what 8 bits cost, that is nothing.
        weight = quant.unpack(layer.packed, torch.float32).double()
        inputs = normal(*layer.x.shape).double()
        full = inputs @ weight.T + (0 if layer.bias is None else layer.bias.double())
        assert relative_l2(got, full) < LUCK * relative_l2(want, full)


def test_this_gpu_has_what_it_should():
    """The self-tests agree, and by far: they are the reason why a user's GPU would go without."""
    kernels = choose_linear(CUDA, torch.bfloat16)
    assert kernels.name == "triton"
    assert linear_registry.difference(CUDA, torch.bfloat16) < backend.SELF_TEST_LIMIT / 2
    kinds = ["int8"] if backend.why_no_float8(CUDA) else ["float8", "int8"]
    assert list(kernels.multiply) == kinds
    for kind in kinds:
        assert linear_registry.why_not(kind, CUDA, torch.bfloat16) is None
        error = linear_registry.product_difference(kind, CUDA, torch.bfloat16)
        print(f"{kind}: {error:.1e}")
        assert error < backend.SELF_TEST_LIMIT / 2
    assert block_registry.difference(CUDA, torch.bfloat16, 64) < backend.SELF_TEST_LIMIT


@pytest.mark.parametrize(
    "form",
    [
        float8,
        int8,
        affine4,
        LayerFormat("int8_tensorwise", 8, rotation=256),
        float8.dynamic(True),
        int8.dynamic(True),
        LayerFormat("int8_tensorwise", 8, rotation=256, inputs="int8"),
    ],
    ids=str,
)
def test_linears_round_no_worse_than_their_definitions(form: LayerFormat):
    kernels = choose_linear(CUDA, torch.bfloat16)
    packed = quant.quantize(normal(4608, HIDDEN, dtype=torch.float32) / 40, form)
    x, bias = normal(1, 4096, HIDDEN), normal(4608)
    weight = quant.dequantize(packed, torch.float32).double()
    exact = x.double() @ weight.T + bias.double()
    ours, theirs = (relative_l2(linear(x, packed, bias, way), exact) for way in (kernels, EAGER_LINEAR))
    print(f"{ours:.2e}, the definition {theirs:.2e}")
    assert ours < LUCK * theirs


def test_new_sizes_compile_nothing(kind: str):
    """Whatever a user asks for after the first pictures, one of each tile."""
    from lens_core.kernels.triton import block, linear, quantize

    compiled = [
        block.add_modulate,
        block.swiglu_quantized,
        quantize.quantize_rows,
        linear.multiply,
        linear.unpack,
    ]
    fast = block_registry.triton_block_kernels()
    kernels = choose_linear(CUDA, torch.bfloat16)
    layers = [layer(n, k, kind) for n, k in SHAPES]
    table = normal(1, 6 * HIDDEN)

    def run(tokens: int, text: int) -> None:
        counts = [tokens, text] if text else [tokens]
        rows = [Rows(normal(1, n, HIDDEN), normal(1, n, HIDDEN), table, table[0, :HIDDEN]) for n in counts]
        _, normed = fast.add_modulate([row._replace(eps=1e-6, after=table) for row in rows], 2, 3, kind)
        gates = [normal(1, n, INNER) for n in counts]
        gated = fast.swiglu(gates, gates, kind)
        for packed, bias in layers:
            wide = packed.values.shape[1] == INNER
            weights, biases = [packed] * len(counts), [bias] * len(counts)
            launch().multiply(gated if wide else normed, weights, biases)
            given = gates if wide else [row.x for row in rows]
            kernels.multiply[kind](kernels.quantize_rows(given, kind), weights, biases)
            kernels.unpack(weights, torch.bfloat16)

    def variants() -> list[int]:
        return [len(kernel.device_caches[CUDA.index][0]) for kernel in compiled]

    for tokens, text in ((4096, 200), (8100, 0), (1000, 0), (300, 20)):
        run(tokens, text)
    before = variants()
    for tokens, text in ((4095, 7), (1, 1), (1024, 16), (37, 0), (16384, 333), (2000, 0), (5999, 512)):
        run(tokens, text)
    assert variants() == before


@pytest.mark.parametrize("tokens", [(4096,), (4096, 200), (8100, 37)], ids=str)
def test_products_in_a_graph(tokens: tuple[int, ...], kind: str):
    """Scales are those of the recording, and so are the bits."""
    kernels = choose_linear(CUDA, torch.bfloat16)
    _, weights, biases = apart(layers(tokens, 4608, HIDDEN, kind))
    streams = [normal(1, count, HIDDEN) for count in tokens]
    x = streams[-1]

    def run() -> Tensor:
        return kernels.multiply[kind](kernels.quantize_rows(streams, kind), weights, biases)[-1]

    first, other = run(), normal(1, tokens[-1], HIDDEN).flip(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    graph.replay()
    assert torch.equal(recorded, first)
    x.copy_(other)
    graph.replay()
    assert torch.equal(recorded, run()) and not torch.equal(recorded, first)
