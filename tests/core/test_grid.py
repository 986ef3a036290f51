"""Grids: seeds from text, which picture lies where, the sheet and its labels in any language."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageFont

from lens_core.errors import SettingError
from lens_core.grid import Axes, arrange, as_labels, draw_sheet, layout, parse_prompts, parse_seeds
from lens_core.grid.label import font_for, wrapped

AXES = Axes(("Lens", "Turbo"), ("a circle", "a square", "a star"), (5, 7))
HEIGHT, WIDTH = 96, 160


def numbered(count: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Pictures of one gray each, from dark to light, none of them white or black."""
    grays = torch.linspace(30, 220, count).round() / 255
    return grays[:, None, None, None].expand(count, height, width, 3)


def cells_of(sheet: torch.Tensor, pictures: torch.Tensor, size: tuple[int, int]) -> list[list[int]]:
    """The numbers of the pictures on a sheet by row, each found whole by its gray."""
    gray, places = (sheet[0, ..., 0] * 255).round(), {}
    for number, picture in enumerate(pictures):
        its = gray == (picture[0, 0, 0] * 255).round()
        height, width = size
        top, left = (int((its.sum(axis) >= least).nonzero()[0]) for axis, least in ((1, width), (0, height)))
        assert its[top : top + height, left : left + width].all(), "a label covers the picture"
        places[number] = top, left
    rows = sorted({y for y, _ in places.values()})
    return [sorted((n for n in places if places[n][0] == y), key=lambda n: places[n][1]) for y in rows]


@pytest.mark.parametrize(
    "text, seeds",
    [
        ("1, 2, 3", (1, 2, 3)),
        ("5-8", (5, 6, 7, 8)),
        (" 10 - 12;3\n3 11", (10, 11, 12, 3)),
        ("18446744073709551615", (2**64 - 1,)),
        ("1-100", tuple(range(1, 101))),
    ],
)
def test_seeds(text: str, seeds: tuple[int, ...]):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    ["", "one", "-1", "1.5", "8-5", "1--2", "18446744073709551616", "1-101", "0-99999999999999999999", "²"],
)
def test_wrong_seeds_say_what_is_expected(text: str):
    with pytest.raises(
        SettingError, match=r"Expected whole numbers and ranges such as|a grid has at most 100"
    ):
        parse_seeds(text)


def test_prompts_are_lines_that_are_not_blank():
    assert parse_prompts("a circle\n\n  a square \r\n") == ("a circle", "a square")
    with pytest.raises(SettingError, match="write at least one"):
        parse_prompts(" \n")


def test_too_many_pictures_are_named_before_anything_is_drawn():
    Axes(("a",) * 10, ("b",) * 10, (1,))
    with pytest.raises(SettingError, match=r"1 models x 101 prompts x 1 seeds are 101 .* at most 100"):
        Axes(("a",), ("b",) * 101, (1,))


@pytest.mark.parametrize(
    "columns, rows, captions, cells",
    [
        ("auto", "a circle/seed 5", ("Lens", "Turbo"), ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11))),
        ("seeds", "a circle/Lens", ("seed 5", "seed 7"), ((0, 1), (6, 7), (2, 3), (8, 9), (4, 5), (10, 11))),
        ("prompts", "Lens/seed 5", AXES.prompts, ((0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11))),
    ],
)
def test_rows_and_columns(columns: str, rows: str, captions: tuple[str, ...], cells: tuple):
    found = arrange(AXES, columns, "160x96")
    assert found.cells == cells and found.title == "160x96"
    assert found.rows[0] == rows.replace("/", "\n")
    assert found.captions[0] == captions and not any(map(any, found.captions[1:]))


def test_what_all_share_is_in_the_title_and_one_axis_fills_the_sheet():
    found = arrange(Axes(("Lens",), ("a circle",), tuple(range(5))), "auto", "160x96")
    assert found.title == "a circle, Lens, 160x96"
    assert found.cells == ((0, 1, 2), (3, 4))
    assert found.captions == (("seed 0", "seed 1", "seed 2"), ("seed 3", "seed 4")) and not any(found.rows)
    alone = arrange(Axes(("Lens",), ("a circle",), (1,)))
    assert alone.cells == ((0,),) and alone.title == "a circle, Lens, seed 1"
    with pytest.raises(SettingError, match="columns is 'steps'; expected one of auto, models"):
        arrange(AXES, "steps")


@pytest.mark.parametrize("columns", ["auto", "models", "prompts", "seeds"])
def test_every_picture_lies_in_its_cell_with_all_its_pixels(columns: str):
    found, pictures = arrange(AXES, columns), numbered(12)
    sheet = draw_sheet(pictures, found)
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3 and sheet.dtype == torch.float32
    assert cells_of(sheet, pictures, (HEIGHT, WIDTH)) == [list(row) for row in found.cells]


def test_labels_are_in_the_order_of_the_pictures():
    labels = as_labels(AXES)
    assert len(labels) == AXES.count
    assert labels[0] == "Lens, seed 5: a circle" and labels[9] == "Turbo, seed 7: a square"


def test_large_pictures_are_made_smaller_and_tiny_ones_are_refused():
    wide = arrange(Axes(("Lens",), ("a circle",), tuple(range(30))), "seeds")
    plan = layout(wide, 1440, 1440)
    assert plan.cell[0] == plan.cell[1] and 200 < plan.cell[0] < 300
    assert 8192 - 60 < plan.size(30)[0] <= 8192
    pictures = numbered(30, 300, 300)
    sheet = draw_sheet(pictures, wide)
    assert sheet.shape[2] <= 8192
    assert cells_of(sheet, pictures, layout(wide, 300, 300).cell) == [list(range(30))]
    with pytest.raises(SettingError, match=r"100 pictures wide and 1 high.*Choose other columns"):
        layout(arrange(Axes(("Lens",), ("a circle",), tuple(range(100))), "seeds"), 1440, 1440)


@pytest.mark.parametrize(
    "prompt",
    [
        "雪の中の赤い狐" * 30,
        "лиса в снегу " * 40,
        "ثعلب أحمر",
        "🦊" * 50,
        "a\tb\x00\x1b[31m\ud800",
        "x" * 2000,
        "'\"<&>",
    ],
    ids=["japanese", "russian", "arabic", "emoji", "control", "one long word", "quotes"],
)
def test_any_prompt_can_be_drawn(prompt: str):
    axes = Axes(("Lens", prompt), (prompt, "a circle"), (1,))
    plain = draw_sheet(numbered(4), arrange(Axes(("Lens", " "), (" ", "a circle"), (1,))))
    sheet = draw_sheet(numbered(4), arrange(axes))
    assert cells_of(sheet, numbered(4), (HEIGHT, WIDTH)) == [[0, 2], [1, 3]]
    assert (sheet < 1).sum() > (plain < 1).sum(), "it is written"


def test_text_is_broken_at_words_and_cut_with_an_ellipsis():
    font = ImageFont.load_default(12)
    lines = wrapped("a red circle " * 20 + "\nseed 5", font, 100, 3)
    assert len(lines) == 3 and lines[-1].endswith("...") and lines[0].startswith("a red circle")
    assert all(font.getlength(line) <= 100 for line in lines)
    assert wrapped("a red circle\nseed 5", font, 100, 3) == ["a red circle", "seed 5"]
    assert "".join(wrapped("x" * 50, font, 100, 9)) == "x" * 50
    assert wrapped("a", font, 100, 0) == []


def test_the_font_is_the_first_that_has_all_letters(monkeypatch: pytest.MonkeyPatch):
    """Names that are not there are passed over; where no font has a letter, the others still count."""
    own = ImageFont.load_default(12).getname()
    assert font_for("a red circle", 12).getname() == own
    assert font_for("лиса", 12).getname() != own, "this machine has DejaVu Sans"
    monkeypatch.setattr("lens_core.grid.label._FONTS", ("no such font.ttf",))
    assert font_for("лиса", 12).getname() == own
