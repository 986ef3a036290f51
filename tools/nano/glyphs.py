"""Capitals and digits in three fonts, as one small committed bitmap, so that drawing needs no font package.

    python -m tools.nano.glyphs FOLDER    # makes glyphs.png anew from the fonts in FOLDER

The fonts are DejaVu Sans Bold, Serif Bold and Sans Mono Bold, which come with the matplotlib package
(``mpl-data/fonts/ttf``). Their licence (Bitstream Vera, with DejaVu's changes in the public domain) allows
copies and changes under other names; pictures made with them are free.

The bitmap has a row of cells for each font and a column for each glyph. A cell is CELL_WIDTH x CELL_HEIGHT
pixels with PAD empty ones around the glyph; capitals are CAP pixels high.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path

import numpy
from PIL import Image, ImageDraw, ImageFont

FONTS = ("sans", "serif", "mono")
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
CAP, PAD = 44, 3
CELL_WIDTH, CELL_HEIGHT = 72, 64
# Empty space between two glyphs, in cap heights: enough that a blurred picture's letters stay apart.
TRACKING = 0.16
# Letters begin on a grid of so many pixels, the VAE's cells.
ADVANCE = 8

_FILE = Path(__file__).with_name("glyphs.png")
_FONT_FILES = {
    "sans": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono-Bold.ttf",
}
# The baseline in a cell: Q and J reach below it, round letters a little.
_BASELINE = PAD + CAP + 3


@cache
def atlas() -> numpy.ndarray:
    """The bitmap, uint8 [fonts * CELL_HEIGHT, glyphs * CELL_WIDTH]: 255 inside of a glyph, 0 outside."""
    return numpy.asarray(Image.open(_FILE).convert("L"))


@cache
def ink_widths() -> dict[str, dict[str, float]]:
    """Each font's widths of the glyphs' ink, in cap heights."""
    cells = atlas().reshape(len(FONTS), CELL_HEIGHT, len(GLYPHS), CELL_WIDTH)
    columns = (cells > 127).any(axis=1).sum(axis=-1)
    return {
        font: {glyph: float(columns[row, column]) / CAP for column, glyph in enumerate(GLYPHS)}
        for row, font in enumerate(FONTS)
    }


def advances(text: str, font: str, cap: float) -> list[float]:
    """Each letter's room in pixels for capitals ``cap`` high, multiples of ADVANCE; ink is in its middle."""
    needed = (cap * (ink_widths()[font][glyph] + TRACKING) for glyph in text)
    return [ADVANCE * math.ceil(width / ADVANCE) for width in needed]


def line_width(text: str, font: str, cap: float) -> float:
    """A line's width in pixels."""
    return sum(advances(text, font, cap))


def draw(folder: Path) -> Image.Image:
    """The bitmap from the fonts' files."""
    picture = Image.new("L", (len(GLYPHS) * CELL_WIDTH, len(FONTS) * CELL_HEIGHT))
    for row, name in enumerate(FONTS):
        font = _at_cap_height(folder / _FONT_FILES[name])
        for column, glyph in enumerate(GLYPHS):
            picture.paste(_ink(font, glyph), (column * CELL_WIDTH + PAD, row * CELL_HEIGHT))
    # Sixteen greys are enough for edges and halve the file.
    return picture.quantize(16)


def _ink(font: ImageFont.FreeTypeFont, glyph: str) -> Image.Image:
    """A glyph as high as a cell and as wide as its ink: a font leaves more space before an I than a T."""
    cell = Image.new("L", (2 * CELL_WIDTH, CELL_HEIGHT))
    ImageDraw.Draw(cell).text((CELL_WIDTH // 2, _BASELINE), glyph, fill=255, font=font, anchor="ls")
    left, _, right, _ = cell.getbbox() or (0, 0, 0, 0)
    return cell.crop((left, 0, right, CELL_HEIGHT))


def _at_cap_height(path: Path) -> ImageFont.FreeTypeFont:
    """The font at the size whose H is CAP pixels high."""
    font = ImageFont.truetype(str(path), 1000)
    height = -font.getbbox("H", anchor="ls")[1]
    return ImageFont.truetype(str(path), round(1000 * CAP / height))


if __name__ == "__main__":
    draw(Path(sys.argv[1])).save(_FILE, optimize=True)
