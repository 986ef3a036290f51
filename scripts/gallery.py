"""What the demo draws with the models that come with the pack, and one sheet of all its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LENS, TURBO = "nano/lens", "nano/lens-turbo"
_COLUMNS, _CELL, _MARGIN = 4, 256, 16
_FONT_SIZE, _LINE, _LINES = 14, 18, 3


@dataclass(frozen=True)
class Shot:
    """A picture to draw; ``model`` is an option of LensModelLoader."""

    prompt: str
    aspect_ratio: str = "1:1"
    model: str = TURBO
    seed: int = 1


SHOTS = (
    Shot("a large red circle on a yellow background"),
    Shot("a small blue square on a white background"),
    Shot("a green triangle left of a purple circle on a white background", "3:2"),
    Shot("an orange star above a blue ring on a black background", "2:3"),
    Shot("three small pink stars on a blue background", "16:9"),
    Shot("two large white crosses on a green background", "4:3"),
    Shot("a yellow ring right of a red square on a gray background", "3:2"),
    Shot("a white circle below a black square on an orange background", "3:4"),
    Shot("three large red circles on a white background", "2:1"),
    Shot("two black squares above a red ring on a yellow background"),
    Shot("a black star on a background fading from blue to white from top to bottom"),
    Shot("two green rings on a pink background with stripes", "9:16"),
    Shot("a large red circle left of a small blue square on a yellow background", "4:3", LENS),
    Shot("three small purple triangles on a white background", "1:1", LENS),
    Shot("a large pink cross right of a small white ring on a black background", "2:1", LENS),
    Shot("a white star above two red squares on a blue background", "3:4", LENS),
)


def write_sheet(shots: Sequence[Shot], pictures: Sequence[Path], target: Path) -> None:
    """All pictures in rows, each with its prompt and model below, as one PNG."""
    width, height = _CELL + _MARGIN, _CELL + _LINES * _LINE + _MARGIN
    rows = -(-len(shots) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width + _MARGIN, rows * height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for index, (shot, path) in enumerate(zip(shots, pictures, strict=True)):
        left = _MARGIN + index % _COLUMNS * width
        top = _MARGIN + index // _COLUMNS * height
        with Image.open(path) as picture:
            picture.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + _CELL - picture.height))
        name = "Turbo, 4 steps" if shot.model == TURBO else "Lens, 20 steps"
        text = _wrapped(draw, f"{shot.prompt} ({name})", font)
        draw.multiline_text((left, top + _CELL + 4), text, "black", font, spacing=_LINE - _FONT_SIZE)
    sheet.save(target)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text in lines that are no wider than a picture."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= _CELL:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
