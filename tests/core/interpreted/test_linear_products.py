"""Products of 8-bit numbers, of the image alone or of image and text in one launch: against fp64, against
the definitions, and what the kernel touches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lens_core.kernels import linear as definitions
from lens_core.kernels.triton import linear_launch
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import LayerFormat, affine4, float8, int8
from tests.compare import relative_l2
from tests.core import quantized_cases as cases

KINDS = ("int8", "float8")
# fp16 rounds what is stored by up to 2^-11 = 5e-4, 2e-4 in the mean. Measured: 2.1e-4.
ROUNDING = 3e-4

pytestmark = pytest.mark.usefixtures("float8_of_torch")


@pytest.fixture(params=["a GPU of one multiprocessor", "a large GPU"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 rows, or of 64, which leave no multiprocessor without work."""
    count = 1 if "one" in request.param else 1000
    monkeypatch.setattr(linear_launch, "multiprocessors", lambda _: count)


def multiply(layers: Sequence[cases.Layer]) -> list[Tensor]:
    return linear_launch.multiply(*zip(*layers, strict=True))


def check(layers: Sequence[cases.Layer], limit: float = ROUNDING) -> list[Tensor]:
    """Against fp64 of each stream's own layer, and the definition."""
    found, want = multiply(layers), definitions.multiply(*zip(*layers, strict=True))
    assert len(found) == len(layers)
    for got, defined, layer in zip(found, want, layers, strict=True):
        assert got.shape == defined.shape == (*layer.x.shape[:-1], layer.packed.rows)
        assert got.dtype == layer.x.dtype
        assert relative_l2(got, cases.exact_product(*layer)) < limit
        assert relative_l2(got, defined) < limit
    return found


# 64 or 128 rows, 128 columns and 128 inputs are a step's share: at their ends and elsewhere.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(128, 64), (96, 144), (304, 48), (8, 384), (7, 256)], ids=str)
@pytest.mark.parametrize("tokens", cases.STREAMS, ids=str)
def test_products(tokens: tuple[int, ...], n: int, k: int, kind: str, tiles: None):
    assert linear_launch.why_not_multiply(n, k) is None
    check(cases.layers(kind, tokens, n, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("bias", [torch.float16, torch.float32, None], ids=str)
@pytest.mark.parametrize("tokens", [(19,), (19, 33), (40, 7)], ids=str)
def test_products_of_two_pictures(
    tokens: tuple[int, ...], bias: torch.dtype | None, one_scale: bool, kind: str, tiles: None
):
    """Batch 2; a scale a row or one for the weight; biases as wide as the results, wider, or none."""
    layers = cases.layers(kind, tokens, 136, 144, 2, one_scale, bias is not None)
    check([x._replace(bias=None if bias is None else x.bias.to(bias)) for x in layers])


def test_biases_of_two_dtypes(tiles: None):
    first, second = cases.layers("int8", (5, 3), 136, 64)
    check([first, second._replace(bias=second.bias.half())])


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("tokens", [(300,), (300, 65), (70, 330)], ids=str)
def test_every_tile_is_made_once(tokens: tuple[int, ...], group: int, monkeypatch, tiles: None):
    """Groups that are full and not, down the rows and along three columns."""
    monkeypatch.setattr(linear_launch, "_GROUP", group)
    check(cases.layers("int8", tokens, 264, 16))


@pytest.mark.parametrize("tokens", [(37,), (37, 5)], ids=str)
def test_products_in_bfloat16(tokens: tuple[int, ...], tiles: None):
    layers = cases.layers("int8", tokens, 96, 64, dtype=torch.bfloat16)
    # The interpreter cuts fp32 to bf16, see test_block.py.
    check([x._replace(bias=x.bias.bfloat16()) for x in layers], limit=5e-3)


@pytest.mark.parametrize("tokens", [(3,), (3, 2)], ids=str)
def test_the_largest_sums(tokens: tuple[int, ...], tiles: None):
    """4096 products of 127 and 127: an integer of 66 million, whose last bits fp32 cannot keep."""
    layers = cases.layers("int8", tokens, 8, 4096, bias=False)
    for x, packed, _ in layers:
        x.values.fill_(127)
        packed.values.fill_(-127)
    check(layers)


def moved(layer: cases.Layer, which: str, move) -> cases.Layer:
    """The layer with some of its tensors put elsewhere."""
    x, packed, bias = layer
    if which in ("values", "all"):
        x = x._replace(values=move(x.values))
    if which in ("scales", "all"):
        x = x._replace(scale=move(x.scale))
    if which in ("weight", "all"):
        packed = packed._replace(values=move(packed.values))
    if which in ("weight's scales", "all"):
        packed = packed._replace(scale=move(packed.scale))
    if which in ("bias", "all"):
        bias = move(bias)
    return cases.Layer(x, packed, bias)


@pytest.mark.parametrize("which", ["values", "scales", "weight", "weight's scales", "bias", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_tensors_anywhere(kind: str, which: str, tiles: None):
    """At no multiple of 16 bytes, in either stream or both: what is computed is the same to the bit."""
    layers = cases.layers(kind, (5, 3), 96, 64, batch=2)
    want = multiply(layers)
    image, text = (moved(layer, which, cases.shifted) for layer in layers)
    for chosen in ([image, layers[1]], [layers[0], text], [image, text]):
        assert all(torch.equal(got, same) for got, same in zip(multiply(chosen), want, strict=True))
    assert torch.equal(multiply([image])[0], want[0])


@pytest.mark.parametrize("which", ["values", "scales", "weight", "weight's scales"])
def test_products_of_any_layout(which: str, tiles: None):
    """Parts of larger tensors, no two numbers side by side."""
    layers = cases.layers("int8", (5, 3), 96, 64, batch=2)
    want = multiply(layers)
    image, text = (moved(layer, which, cases.spread) for layer in layers)
    for chosen in ([image, layers[1]], [layers[0], text], [image, text]):
        assert all(torch.equal(got, same) for got, same in zip(multiply(chosen), want, strict=True))
    assert torch.equal(multiply([image])[0], want[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(19,), (19, 3), (3, 19), (64, 64)], ids=str)
def test_products_write_their_results_alone(tokens: tuple[int, ...], kind: str, tiles: None, fences):
    layers = cases.layers(kind, tokens, 96, 144, batch=2)
    fenced = [moved(layer, "all", fences.around) for layer in layers]
    for got, held, layer in zip(multiply(fenced), fenced, layers, strict=True):
        assert relative_l2(got, cases.exact_product(*layer)) < ROUNDING
        for now, was in ((held.x.values, layer.x.values), (held.packed.values, layer.packed.values)):
            assert torch.equal(now.view(torch.uint8), was.view(torch.uint8))
    fences.assert_intact()


@pytest.mark.parametrize(("rows", "columns"), [(96, 341), (100, 72), (96, 24)])
def test_sizes_that_are_not_multiplied(rows: int, columns: int):
    reason = f"a layer has {columns} inputs, no multiple of 16"
    assert linear_launch.why_not_multiply(rows, columns) == reason


TURNED = LayerFormat("int8_tensorwise", 8, rotation=64)
KERNELS = definitions.LinearKernels(
    "triton",
    linear_launch.quantize_rows,
    linear_launch.unpack,
    {"int8": linear_launch.multiply, "float8": linear_launch.multiply},
)
FORMS = [float8, int8, TURNED, affine4, *(form.dynamic(True) for form in (float8, int8, TURNED))]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [(5,), (5, 3), (3, 5)], ids=str)
def test_linears_of_every_format(tokens: tuple[int, ...], form: LayerFormat, monkeypatch):
    """The one way through them, by this backend: each step one launch, however many streams there are."""
    launched: list[str] = []
    launch = linear_launch.launch
    monkeypatch.setattr(
        linear_launch,
        "launch",
        lambda function, *rest: (launched.append(function.__name__), launch(function, *rest)),
    )
    streams = [torch.randn(2, count, 256).half() for count in tokens]
    weights = [quant.quantize(torch.randn(96, 256), form) for _ in tokens]
    biases = [torch.randn(96) for _ in tokens]
    found = definitions.linears(streams, weights, biases, KERNELS)
    assert launched == (["quantize_rows", "multiply"] if form.inputs else ["unpack"])
    want = definitions.linears([x.float() for x in streams], weights, biases, definitions.EAGER_LINEAR)
    for got, exact in zip(found, want, strict=True):
        # fp16 rounds inputs (turned ones before they are quantised, some of which then go the other way:
        # 1e-3, and 3e-3 where three bits are kept), weights and result.
        assert relative_l2(got, exact) < (3e-3 if form.inputs else 6e-4), form


def test_linears_with_and_without_a_bias():
    """One launch is for layers that are alike in this too."""
    x = [torch.randn(2, count, 256).half() for count in (5, 3)]
    weights = [quant.quantize(torch.randn(96, 256), int8.dynamic(True)) for _ in x]
    bias = torch.randn(96)
    for biases in ([bias, None], [None, bias]):
        found = definitions.linears(x, weights, biases, KERNELS)
        for got, *layer in zip(found, x, weights, biases, strict=True):
            assert torch.equal(got, definitions.linear(*layer, KERNELS))
