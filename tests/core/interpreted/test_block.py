"""The denoiser's kernels around attention: against fp64, against their definitions, and what they touch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lens_core.kernels import block as definitions
from lens_core.kernels.block import Rows
from lens_core.kernels.triton import block, block_launch
from lens_core.tiny.models import DENOISER as TINY
from tests.compare import relative_l2
from tests.core import block_cases as cases
from tests.core import block_formulas as formulas
from tests.core import quantized_cases as quantized

DTYPES = (torch.float16, torch.bfloat16)
# A kernel rounds where it stores: up to 2^-11 = 5e-4 in fp16, 2e-4 in the mean. The interpreter cuts fp32 to
# bf16 instead of rounding it: up to 2^-7 = 8e-3, 3e-3 in the mean. Measured: 2.6e-4 and 4.0e-3.
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 5e-3}
# The definitions round in between too. Measured: 6.5e-4 and 7.0e-3.
FROM_DEFINITION = {torch.float16: 8e-4, torch.bfloat16: 1e-2}
# Two rows are a program's share of a norm and of the heads: one, two and three rows of either stream.
TOKENS = [(1,), (2,), (3,), (1, 3), (2, 2), (3, 1)]


def strided(x: Tensor) -> Tensor:
    """The same numbers, but no two of them side by side."""
    spread = x.new_full((*x.shape, 2), float("nan"))
    spread[..., 0] = x
    assert not spread[..., 0].is_contiguous()
    return spread[..., 0]


def copied(x: Tensor) -> Tensor:
    """A copy in the same layout, to be overwritten."""
    return x.clone() if x.is_contiguous() else strided(x)


def check_rows(rows: Sequence[Rows], gate: int, shift: int) -> None:
    """Totals and norms against fp64 (of the stored totals: the next block reads those) and the definition."""
    dtype = rows[0].x.dtype
    totals, normed = block_launch.add_modulate(rows, gate, shift)
    want_totals, want_normed = definitions.add_modulate(rows, gate, shift)
    assert len(totals) == len(want_totals) and len(normed) == len(want_normed)
    for row, total, want in zip(rows, totals, want_totals, strict=True):
        assert total.dtype == dtype and total.shape == row.x.shape
        assert relative_l2(total, formulas.total(row, gate)) < ROUNDING[dtype]
        assert relative_l2(total, want) < FROM_DEFINITION[dtype]
    for row, total, norm, want in zip(rows, totals, normed, want_normed, strict=False):
        assert norm.dtype == dtype and norm.shape == row.x.shape
        assert relative_l2(norm, formulas.normed(total, row, shift)) < ROUNDING[dtype]
        assert relative_l2(norm, want) < FROM_DEFINITION[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gate", "shift"), [(5, 0), (2, 3)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_gated_updates_and_norms(
    tokens: tuple[int, ...], batch: int, gate: int, shift: int, dtype: torch.dtype
):
    check_rows(cases.rows(tokens, batch, TINY.hidden_size, dtype), gate, shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1536, 96, 4])
def test_rows_as_wide_as_lens_and_as_no_power_of_two(hidden: int, dtype: torch.dtype):
    """Tables count in rows of ``hidden``, memory in powers of two."""
    check_rows(cases.rows((3, 2), 2, hidden, dtype), 5, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(3,), (2, 3)], ids=str)
def test_one_level_for_all_pictures(tokens: tuple[int, ...], dtype: torch.dtype):
    """Its tables are one row, repeated without a copy."""
    one = cases.rows(tokens, 1, TINY.hidden_size, dtype)
    three = cases.rows(tokens, 3, TINY.hidden_size, dtype)
    repeated = [
        row._replace(before=alone.before.expand(3, -1), after=alone.after.expand(3, -1))
        for row, alone in zip(three, one, strict=True)
    ]
    assert repeated[0].before.stride(0) == 0
    check_rows(repeated, 5, 0)


def test_each_stream_has_tables_of_its_own_stride():
    rows = cases.rows((2, 3), 2, TINY.hidden_size, torch.float16)
    image, text = rows
    mixed = [
        image._replace(before=image.before.clone(), after=image.after[:1].expand(2, -1)),
        text._replace(before=text.before[:1].expand(2, -1), after=text.after.clone()),
    ]
    assert len({table.stride(0) for row in mixed for table in (row.before, row.after)}) == 2
    check_rows(mixed, 2, 3)
    check_rows([mixed[0], text], 2, 3)


@pytest.mark.parametrize("tokens", [(3,), (1, 3)], ids=str)
def test_the_first_block_adds_nothing(tokens: tuple[int, ...]):
    rows = [row._replace(update=None) for row in cases.rows(tokens, 2, TINY.hidden_size, torch.float16)]
    check_rows(rows, 5, 0)
    totals, _ = block_launch.add_modulate(rows, 5, 0)
    assert all(total is row.x for total, row in zip(totals, rows, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(3,), (1, 3)], ids=str)
def test_the_last_block_normalises_nothing(tokens: tuple[int, ...], dtype: torch.dtype):
    rows = cases.rows(tokens, 2, TINY.hidden_size, dtype)
    check_rows([Rows(*row[:3]) for row in rows], 5, 0)
    assert block_launch.add_modulate([Rows(*row[:3]) for row in rows], 5, 0)[1] == []


def test_rows_of_any_layout():
    rows = cases.rows((3, 2), 2, TINY.hidden_size, torch.float16)
    apart = [row._replace(x=strided(row.x), update=strided(row.update)) for row in rows]
    check_rows(apart, 5, 0)


@pytest.mark.parametrize("tokens", [(3,), (1, 3)], ids=str)
def test_rows_write_their_results_alone(tokens: tuple[int, ...], fences):
    rows = []
    for row in cases.rows(tokens, 2, TINY.hidden_size, torch.float16):
        fenced = {name: fences.around(getattr(row, name)) for name in ("x", "update", "weight")}
        rows.append(row._replace(**fenced, before=fences.around(row.before), after=fences.around(row.after)))
    before = [[value.clone() for value in row if isinstance(value, Tensor)] for row in rows]
    check_rows(rows, 5, 0)
    check_rows([row._replace(update=None) for row in rows], 5, 0)
    check_rows([Rows(*row[:3]) for row in rows], 5, 0)
    fences.assert_intact()
    for row, values in zip(rows, before, strict=True):
        now = [value for value in row if isinstance(value, Tensor)]
        assert all(torch.equal(value, was) for value, was in zip(now, values, strict=True))


def test_a_residual_stream_of_3e7():
    """As large as the checkpoint's: its squares are summed in fp32. Half of 2^-7 is bf16's last bit."""
    rows = cases.rows((2, 1), 1, TINY.hidden_size, torch.bfloat16)
    check_rows([row._replace(x=row.x * 3e9, update=row.update * 3e7) for row in rows], 5, 0)


# fp32 rounds some ten times by 2^-24 before a row is quantised, and its reciprocal root by twice that.
SLACK = 2e-6
KINDS = ("int8", "float8")


def check_quantized_rows(rows: Sequence[Rows], kind: str, gate: int = 5, shift: int = 0) -> None:
    """Norms are the nearest 8-bit numbers to fp64's, totals to the bit those without quantisation."""
    totals, normed = block_launch.add_modulate(rows, gate, shift, kind)
    plain, _ = block_launch.add_modulate(rows, gate, shift)
    assert all(torch.equal(total, want) for total, want in zip(totals, plain, strict=True))
    for row, total, norm in zip(rows, totals, normed, strict=True):
        assert norm.dtype == row.x.dtype
        quantized.assert_nearest(norm, formulas.normed(total, row, shift), kind, SLACK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gate", "shift"), [(5, 0), (2, 3)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_quantized_norms(
    tokens: tuple[int, ...], batch: int, gate: int, shift: int, kind: str, float8_of_torch: None
):
    rows = cases.rows(tokens, batch, TINY.hidden_size, torch.bfloat16)
    check_quantized_rows(rows, kind, gate, shift)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [1536, 96, 4])
def test_quantized_norms_of_any_width(hidden: int, kind: str, float8_of_torch: None):
    rows = cases.rows((3, 2), 2, hidden, torch.float16)
    check_quantized_rows(rows, kind)
    check_quantized_rows([row._replace(update=None) for row in rows], kind)
    assert block_launch.add_modulate([Rows(*row[:3]) for row in rows], 5, 0, kind)[1] == []


def test_quantized_norms_of_nothing_and_of_3e7():
    """A row of zeros without a shift is zeros; a residual stream as large as the checkpoint's, numbers."""
    rows = cases.rows((2, 1), 1, TINY.hidden_size, torch.bfloat16)
    check_quantized_rows([row._replace(x=row.x * 3e9, update=row.update * 3e7) for row in rows], "int8")
    still = [row._replace(x=torch.zeros_like(row.x), update=None, after=0 * row.after) for row in rows]
    _, normed = block_launch.add_modulate(still, 5, 0, "int8")
    assert all((norm.values == 0).all() and norm.scale.isfinite().all() for norm in normed)


@pytest.mark.parametrize("tokens", [(3,), (1, 3)], ids=str)
def test_quantized_norms_write_their_results_alone(tokens: tuple[int, ...], fences):
    rows = []
    for row in cases.rows(tokens, 2, 96, torch.float16):
        fenced = {name: fences.around(getattr(row, name)) for name in ("x", "update", "weight")}
        rows.append(row._replace(**fenced, before=fences.around(row.before), after=fences.around(row.after)))
    check_quantized_rows(rows, "int8")
    check_quantized_rows([row._replace(update=None) for row in rows], "int8")
    fences.assert_intact()


def check_heads(
    streams: list[Tensor], tokens: Sequence[int], rotary: Tensor, angle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a copy of ``streams`` against fp64 and the definition."""
    dtype = streams[0].dtype
    norms = cases.head_norms(len(tokens), dtype)
    exact = formulas.heads(streams, norms, angle)
    definition = definitions.joint_heads(streams, norms, rotary)
    got = block_launch.joint_heads([copied(qkv) for qkv in streams], norms, rotary)
    for name, x, want, defined in zip("qkv", got, exact, definition, strict=True):
        assert x.shape == want.shape and x.dtype == dtype
        assert relative_l2(x, want) < ROUNDING[dtype], name
        assert relative_l2(x, defined) < FROM_DEFINITION[dtype], name
    assert torch.equal(got[2], definition[2]), "values are copied as they are"
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_heads(tokens: tuple[int, ...], batch: int, dtype: torch.dtype):
    angle, rotary = cases.angles(tokens)
    check_heads(cases.projections(tokens, batch, 2, dtype), tokens, rotary, angle)


@pytest.mark.parametrize("heads", [1, 3, 12, 24])
def test_heads_in_groups_of_a_power_of_two(heads: int):
    angle, rotary = cases.angles((3, 2))
    check_heads(cases.projections((3, 2), 1, heads, torch.float16), (3, 2), rotary, angle)


def test_heads_of_any_layout():
    """A rotation table that is part of a longer one, too."""
    tokens = (3, 2)
    angle, rotary = cases.angles(tokens)
    longer = torch.cat([rotary, rotary.new_full((2, 4, 32), float("nan"))], dim=1)[:, :5]
    assert not longer.is_contiguous()
    streams = cases.projections(tokens, 2, 2, torch.float16)
    check_heads([strided(qkv) for qkv in streams], tokens, longer, angle)


def test_heads_without_text_are_turned_in_place():
    _, rotary = cases.angles((3,))
    (qkv,) = cases.projections((3,), 2, 2, torch.float16)
    values = qkv.chunk(3, dim=-1)[2].clone()
    q, k, v = block_launch.joint_heads([qkv], cases.head_norms(1, torch.float16), rotary)
    assert [x.data_ptr() - qkv.data_ptr() for x in (q, k, v)] == [0, 256, 512]
    assert torch.equal(qkv.chunk(3, dim=-1)[2], values)


@pytest.mark.parametrize("tokens", [(3,), (1, 3), (3, 1)], ids=str)
def test_heads_write_their_results_alone(tokens: tuple[int, ...], fences):
    angle, rotary = cases.angles(tokens)
    norms = cases.head_norms(len(tokens), torch.float16)
    norms = [norm._replace(q=fences.around(norm.q), k=fences.around(norm.k)) for norm in norms]
    streams = cases.projections(tokens, 2, 2, torch.float16)
    fenced = [fences.around(qkv) for qkv in streams]
    q, k, _ = block_launch.joint_heads(fenced, norms, fences.around(rotary))
    exact = formulas.heads(streams, norms, angle)
    assert relative_l2(q, exact[0]) < ROUNDING[torch.float16]
    assert relative_l2(k, exact[1]) < ROUNDING[torch.float16]
    fences.assert_intact()


def check_gates(gates: list[Tensor], ups: list[Tensor]) -> None:
    dtype = gates[0].dtype
    want = definitions.swiglu(gates, ups)
    got = block_launch.swiglu([copied(gate) for gate in gates], ups)
    assert len(got) == len(want)
    for x, gate, up, defined in zip(got, gates, ups, want, strict=True):
        assert x.shape == gate.shape and x.dtype == dtype
        assert relative_l2(x, formulas.gated(gate, up)) < ROUNDING[dtype]
        assert relative_l2(x, defined) < FROM_DEFINITION[dtype]


# 2048 numbers are a program's share: 6 rows of the tiny model's 341 end before its end, 7 behind it.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [(1,), (3,), (7,), (6, 1), (7, 3), (1, 7)], ids=str)
@pytest.mark.parametrize("inner", [TINY.mlp_hidden_size])
def test_gates(tokens: tuple[int, ...], batch: int, inner: int, dtype: torch.dtype):
    pairs = [[torch.randn(batch, count, inner).to(dtype) for count in tokens] for _ in range(2)]
    check_gates(*pairs)


@pytest.mark.parametrize("inner", [4096, 1024, 2])
def test_gates_as_wide_as_lens_and_as_programs(inner: int):
    pairs = [[torch.randn(1, count, inner).half() for count in (2, 3)] for _ in range(2)]
    check_gates(*pairs)
    check_gates(*([strided(x) for x in streams] for streams in pairs))


@pytest.mark.parametrize("tokens", [(3,), (7, 3)], ids=str)
def test_gates_are_overwritten_and_nothing_else(tokens: tuple[int, ...], fences):
    gates, ups = ([fences.around(torch.randn(2, count, 341).half()) for count in tokens] for _ in range(2))
    exact = [formulas.gated(gate, up) for gate, up in zip(gates, ups, strict=True)]
    before = [up.clone() for up in ups]
    got = block_launch.swiglu(gates, ups)
    assert [x.data_ptr() for x in got] == [gate.data_ptr() for gate in gates]
    assert all(relative_l2(x, want) < ROUNDING[torch.float16] for x, want in zip(got, exact, strict=True))
    assert all(torch.equal(up, was) for up, was in zip(ups, before, strict=True))
    fences.assert_intact()


def test_gates_far_from_zero():
    """Closed ones give zero, not NaN; open ones let everything through."""
    gate = torch.tensor([-1e5, -200.0, 0.0, 200.0, 1e5]).bfloat16()[None, None]
    (got,) = block_launch.swiglu([gate.clone()], [torch.full_like(gate, 2.0)])
    assert got[0, 0, :3].tolist() == [0, 0, 0]
    assert torch.equal(got[0, 0, 3:], 2 * gate[0, 0, 3:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [TINY.mlp_hidden_size, 4096, 2])
@pytest.mark.parametrize("tokens", [(1,), (3, 2)], ids=str)
def test_quantized_gates(
    tokens: tuple[int, ...], inner: int, dtype: torch.dtype, kind: str, float8_of_torch: None
):
    gates, ups = ([torch.randn(2, count, inner).to(dtype) for count in tokens] for _ in range(2))
    got = block_launch.swiglu([strided(gate) for gate in gates], ups, kind)
    for x, gate, up in zip(got, gates, ups, strict=True):
        assert x.dtype == dtype
        quantized.assert_nearest(x, formulas.gated(gate, up), kind, SLACK)


@pytest.mark.parametrize("tokens", [(3,), (1, 3)], ids=str)
def test_quantized_gates_write_their_results_alone(tokens: tuple[int, ...], fences):
    gates, ups = ([torch.randn(2, count, 341).half() for count in tokens] for _ in range(2))
    fenced = [[fences.around(x) for x in streams] for streams in (gates, ups)]
    for x, gate, up in zip(block_launch.swiglu(*fenced, "int8"), gates, ups, strict=True):
        quantized.assert_nearest(x, formulas.gated(gate, up), "int8", SLACK)
    assert all(torch.equal(x, was) for x, was in zip(fenced[1], ups, strict=True))
    fences.assert_intact()


def test_quantized_gates_of_nothing_and_of_1e5():
    gate = torch.stack([torch.zeros(96), 1.4e5 * torch.randn(96)]).bfloat16()[None]
    (got,) = block_launch.swiglu([gate.clone()], [torch.full_like(gate, 2.0)], "int8")
    assert (got.values[0, 0] == 0).all() and got.scale.isfinite().all()
    # Below -88 silu underflows, which no number of this row is near.
    quantized.assert_nearest(
        got, formulas.gated(gate, torch.full_like(gate, 2.0)).nan_to_num(), "int8", SLACK
    )


def test_more_gates_than_31_bits_count():
    """32 pictures of 2048 x 2048 at once. Only the first program runs here; it is the image's."""
    gate, up = torch.randn(2048).half(), torch.randn(2048).half()
    text = torch.randn(2048).half()
    want, before = formulas.gated(gate, up), text.clone()
    rows = 2**31 // 4096 + 1
    block.swiglu[(1,)](gate, up, text, text, rows, 1, WIDTH=4096, BLOCK=2048)
    assert relative_l2(gate, want) < ROUNDING[torch.float16]
    assert torch.equal(text, before)
