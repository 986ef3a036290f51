"""Text on a sheet: in a font that has its letters, broken into lines, cut where there is no more room.

Pillow's own font has the letters of English alone. One with those of all languages is too large to bring
along (Chinese takes 5 MB and more), so those of the system are used, found under their usual names. Where
there is none, a letter is drawn as a box: never an error.
"""

from __future__ import annotations

from functools import lru_cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Those of alphabets first: Linux, Windows, macOS; then those that have Chinese, Japanese and Korean.
_FONTS = (
    "DejaVuSans.ttf",
    "segoeui.ttf",
    "arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSans-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "msyh.ttc",
    "YuGothM.ttc",
    "meiryo.ttc",
    "malgun.ttf",
    "Hiragino Sans GB.ttc",
    "PingFang.ttc",
    "AppleSDGothicNeo.ttc",
)
# No font has a letter here, so this is what a font draws where it has none.
_NO_LETTER = "\U0010fffe"
_ELLIPSIS = "..."


def font_for(text: str, size: int) -> Font:
    """Pillow's own font if it has every letter of the text, else the first of the system's that has, else
    the one that has most."""
    letters = "".join(sorted({letter for letter in text if not letter.isspace() and letter.isprintable()}))
    best, fewest = ImageFont.load_default(size), len(letters) + 1
    for name in ("", *_FONTS):
        font = _font(name, size)
        lacking = len(letters) + 1 if font is None else sum(not _has(font, letter) for letter in letters)
        if font is not None and lacking < fewest:
            best, fewest = font, lacking
        if not fewest:
            break
    return best


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """At most ``most`` lines no wider than ``width`` pixels, the last with an ellipsis where text is left."""
    lines = [line for paragraph in text.splitlines() for line in _broken(_plain(paragraph), font, width)]
    if len(lines) <= most:
        return lines
    last = lines[most - 1] if most else ""
    while last and font.getlength(last + _ELLIPSIS) > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + _ELLIPSIS] if most else []


def _plain(text: str) -> str:
    """Without control characters, which fonts draw as boxes or not at all."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _broken(text: str, font: Font, width: int) -> list[str]:
    """Lines of a paragraph: at spaces, and within words that are too wide, as in scripts without spaces."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> Font | None:
    """A font of the system by its file name, Pillow's own for ""; None if it is not there."""
    if not name:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    """Whether a font draws this letter as something else than what it lacks."""
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))
