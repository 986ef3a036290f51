"""8-bit numbers with a scale for each row, made where the row is in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_quantized(x, values, scales, at, row, ok, row_ok):
    """Rows x [R, C] in fp32, zero where they are not ``ok``: nearest 8-bit numbers to ``values + at``, and
    what these are to be multiplied by to ``scales + row`` [R, 1].

    Nothing has to be clamped: a row's largest number becomes the kind's largest but for the last bit of
    fp32, which rounds away. The bits of positive floats are in the numbers' order, and those of NaN above
    all: one in a row is its scale.
    """
    integers: tl.constexpr = values.dtype.element_ty == tl.int8
    largest: tl.constexpr = 127.0 if integers else 448.0
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    top = tl.maximum(top, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(top[:, None], largest)
    tl.store(scales + row, scale, mask=row_ok)
    scaled = x * tl.div_rn(1.0, scale)
    if integers:
        # Beside 1.5 * 2^23 fp32 counts in ones: the sum is rounded to nearest even, its low byte the number.
        number = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        number = scaled.to(tl.float8e4nv)
    tl.store(values + at, number, mask=ok)


@triton.jit
def _quantized_rows(x, values, scales, row, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``row`` [R, 1] of one stream."""
    column = tl.arange(0, BLOCK)[None, :]
    ok = (row < rows) & (column < WIDTH)
    at = row * WIDTH + column
    wide = tl.load(x + at, mask=ok, other=0).to(tl.float32)
    store_quantized(wide, values, scales, at, row, ok, row < rows)


@triton.jit(do_not_specialize=["img_rows", "txt_rows"])
def quantize_rows(
    img, img_values, img_scales, txt, txt_values, txt_scales, img_rows, txt_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Streams [rows, WIDTH]; a program sees whole rows, the first programs the image's."""
    program = tl.program_id(0).to(tl.int64)
    image_programs = tl.cdiv(img_rows, ROWS)
    lane = tl.arange(0, ROWS)[:, None]
    if program < image_programs:
        _quantized_rows(img, img_values, img_scales, program * ROWS + lane, img_rows, WIDTH, BLOCK)
    else:
        row = (program - image_programs) * ROWS + lane
        _quantized_rows(txt, txt_values, txt_scales, row, txt_rows, WIDTH, BLOCK)
