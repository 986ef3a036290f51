"""A contact sheet: pictures in rows and columns, their labels above and to the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import SettingError
from .label import font_for, wrapped
from .plan import Arrangement

# Browsers show no larger picture; and in a smaller cell nobody sees what it is.
LONGEST_SIDE, SMALLEST_CELL = 8192, 128
_GAP = 8
_LINES_OF_TITLE, _LINES_ABOVE = 3, 4
_SMALLEST_FONT, _LARGEST_FONT, _SMALLEST_LEFT = 12, 56, 160


@dataclass(frozen=True)
class Layout:
    """In pixels: (height, width) of a cell, the font's size, the width left of all cells, the height of the
    title and of the labels above each row."""

    cell: tuple[int, int]
    font_size: int
    left: int
    title: int
    above: tuple[int, ...]

    @property
    def line(self) -> int:
        """Height of a line of text."""
        return _line(self.font_size)

    def size(self, columns: int) -> tuple[int, int]:
        """(width, height) of the sheet."""
        height, width = self.cell
        labels = self.title + sum(self.above)
        return self.left + columns * (width + _GAP) + _GAP, labels + len(self.above) * (height + _GAP) + _GAP


def layout(arrangement: Arrangement, height: int, width: int) -> Layout:
    """Room for pictures of a size in pixels; they become smaller where the sheet's side would be above
    LONGEST_SIDE. Raises SettingError where they would be smaller than SMALLEST_CELL."""
    rows, columns = len(arrangement.cells), len(arrangement.cells[0])
    font_size = min(max(width // 28, _SMALLEST_FONT), _LARGEST_FONT)
    left = max(width // 2, _SMALLEST_LEFT) if any(arrangement.rows) else 0
    captioned = sum(map(any, arrangement.captions))
    texts = (_LINES_OF_TITLE + _LINES_ABOVE * captioned) * _line(font_size)
    across = (LONGEST_SIDE - left - _GAP) // columns - _GAP
    down = (LONGEST_SIDE - texts - _GAP) // rows - _GAP
    scale = min(1.0, across / width, down / height)
    cell = (int(height * scale), int(width * scale))
    if max(cell) < SMALLEST_CELL:
        raise SettingError(
            f"The sheet would be {columns} pictures wide and {rows} high, and none could have the "
            f"{SMALLEST_CELL} pixels that it needs to be seen. Choose other columns, or leave some out."
        )
    whole = left + columns * (cell[1] + _GAP)
    title = _height([arrangement.title], font_size, whole, _LINES_OF_TITLE)
    above = tuple(_height(row, font_size, cell[1], _LINES_ABOVE) for row in arrangement.captions)
    return Layout(cell, font_size, left, title, above)


def draw_sheet(pictures: Tensor, arrangement: Arrangement) -> Tensor:
    """A sheet [1, H, W, 3] of pictures [N, h, w, 3], all from 0 to 1; raises SettingError as ``layout``."""
    plan = layout(arrangement, pictures.shape[1], pictures.shape[2])
    height, width = plan.cell
    columns = len(arrangement.cells[0])
    sheet = Image.new("RGB", plan.size(columns), "white")
    _write(sheet, (_GAP, _GAP, sheet.width - _GAP, _GAP + plan.title), arrangement.title, plan)
    top = _GAP + plan.title
    for cells, row, captions, above in zip(
        arrangement.cells, arrangement.rows, arrangement.captions, plan.above, strict=True
    ):
        bottom = top + above + height
        _write(sheet, (_GAP, top + above, plan.left, bottom), row, plan)
        for column, number in enumerate(cells):
            left = plan.left + _GAP + column * (width + _GAP)
            _write(sheet, (left, top, left + width, top + above), captions[column], plan)
            sheet.paste(_fitted(pictures[number], plan.cell), (left, top + above))
        top = bottom + _GAP
    return torch.from_numpy(np.asarray(sheet, np.float32) / 255)[None]


def _line(font_size: int) -> int:
    return font_size * 5 // 4


def _height(texts: Sequence[str], font_size: int, width: int, most: int) -> int:
    """Of the longest of texts in lines of a width, at most so many."""
    return max(len(wrapped(text, font_for(text, font_size), width, most)) for text in texts) * _line(
        font_size
    )


def _write(sheet: Image.Image, box: tuple[int, int, int, int], text: str, plan: Layout) -> None:
    """Text into a box (left, top, right, bottom), as many lines of it as there is room for."""
    left, top, right, bottom = box
    if not text:
        return
    font = font_for(text, plan.font_size)
    lines = wrapped(text, font, right - left, (bottom - top) // plan.line)
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((left, top + number * plan.line), line, "black", font)


def _fitted(picture: Tensor, cell: tuple[int, int]) -> Image.Image:
    """A picture [h, w, 3] in bytes as ComfyUI's SaveImage writes it, not larger than its cell."""
    image = Image.fromarray((picture.clamp(0, 1) * 255).to(torch.uint8).numpy())
    return image if image.size == cell[::-1] else image.resize(cell[::-1], Image.Resampling.LANCZOS)
