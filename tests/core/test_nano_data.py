"""Nano Lens' pictures, captions and split, and the checker that reads pictures back."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from lens_core.sampling.resolution import BUCKETS
from lens_core.vae import to_uint8
from tools.nano.captions import caption, plain_caption
from tools.nano.checker import UNCLEAR, Reading, agreement, decided, judge, read, shares
from tools.nano.glyphs import ADVANCE, FONTS
from tools.nano.render import collate, render
from tools.nano.scenes import (
    COLOURS,
    GRADIENTS,
    SHAPES,
    SIZES,
    WORDS,
    Background,
    Group,
    Place,
    Scene,
    Word,
    combinations,
    is_held_out,
    sample_scene,
)

NONE = (0.0, 0.0, 0.0)
ALL = {"background", "colour", "shape", "count", "relation", "size", "text"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scenes(count: int, seed: int = 0, held_out: bool = True) -> list[Scene]:
    """All sizes in turn."""
    rng = random.Random(seed)
    return [sample_scene(rng, held_out, SIZES[index % len(SIZES)]) for index in range(count)]


def picture(scene: Scene) -> np.ndarray:
    return to_uint8(render(collate([scene]), scene.height, scene.width))[0].numpy()


@cache
def drawn() -> list[tuple[Scene, np.ndarray]]:
    """300 held-out scenes and their pictures."""
    return [(scene, picture(scene)) for scene in scenes(300)]


@cache
def readings() -> list[tuple[Scene, Reading]]:
    """The same scenes and what the checker reads."""
    return [(scene, read(clean)) for scene, clean in drawn()]


def soft(clean: np.ndarray, seed: int) -> np.ndarray:
    """A little blurred and noisy, as a generative model's pictures."""
    noise = np.random.default_rng(seed).normal(0, 5, clean.shape)
    return (ndimage.gaussian_filter(clean.astype(float), (1, 1, 0)) + noise).clip(0, 255).astype(np.uint8)


def test_the_checker_reads_what_was_drawn():
    right = shares([agreement(scene, reading) for scene, reading in readings()])
    assert right.keys() == ALL
    assert min(right.values()) >= 0.99, right


def test_the_checker_knows_a_picture_from_a_haze():
    """Every picture that is learnt from is decided, but for a tint now and then."""
    right = shares([decided(clean) for _, clean in drawn()[:108]])
    assert right["background"] >= 0.97 and right["shape"] == 1
    brown, red = (np.full((256, 256, 3), colour, np.uint8) for colour in ((150, 120, 95), COLOURS["red"]))
    assert decided(brown) == {"background": False, "shape": False}
    assert decided(red) == {"background": True, "shape": False}


def test_the_checker_reads_soft_pictures():
    right = shares([judge(scene, soft(clean, index)) for index, (scene, clean) in enumerate(drawn()[:108])])
    assert right.keys() == ALL
    assert min(right.values()) >= 0.97, right


def changed(scene: Scene, what: str) -> Scene | None:
    """The scene with one thing said differently, or None where it says nothing of it."""
    main = scene.main
    if what == "background":
        taken = (scene.background.colour, scene.background.second)
        return replace(scene, background=Background(next(name for name in COLOURS if name not in taken)))
    if what == "colour":
        shown = (main.colour, scene.other and scene.other.colour)
        return replace(scene, main=replace(main, colour=next(name for name in COLOURS if name not in shown)))
    if what == "relation":
        return replace(scene, relation=OPPOSITE[scene.relation]) if scene.relation else None
    if isinstance(main, Word):
        other = next(word for word in WORDS if word != main.text)
        return replace(scene, main=replace(main, text=other)) if what == "text" else None
    shown = (main.shape, getattr(scene.other, "shape", None))
    values = {
        "shape": next(name for name in SHAPES if name not in shown),
        "count": main.count % 3 + 1,
        "size": {"small": "large", "large": "small"}[main.size],
    }
    return replace(scene, main=replace(main, **{what: values[what]})) if what in values else None


@pytest.mark.parametrize("what", sorted(ALL))
def test_the_checker_notices_what_was_not_drawn(what: str):
    """Where a caption says something else than the picture shows, that is judged wrong."""
    others = [(changed(scene, what), reading) for scene, reading in readings()]
    stated = [(scene, reading) for scene, reading in others if scene is not None]
    assert len(stated) >= 30
    assert not any(agreement(scene, reading)[what] for scene, reading in stated)


def test_exchanged_colours_are_noticed():
    """ "A red circle left of a blue square" is not a blue circle left of a red square."""
    found = 0
    for scene in scenes(100):
        if not isinstance(scene.main, Group) or scene.other is None or scene.main.shape == scene.other.shape:
            continue
        parts = scene.main, scene.other
        if parts[0].colour == parts[1].colour or parts[0].colour == scene.background.colour:
            continue
        exchanged = replace(
            scene,
            main=replace(parts[0], colour=parts[1].colour),
            other=replace(parts[1], colour=parts[0].colour),
        )
        judged = judge(scene, picture(exchanged))
        assert not judged["shape"] and not judged["relation"], (scene, judged)
        found += 1
    assert found >= 10


def test_an_empty_picture_shows_nothing():
    empty = read(np.full((*SIZES[0], 3), COLOURS["green"], np.uint8))
    assert (empty.background, empty.shapes, empty.line) == (Background("green"), (), None)


def test_a_blot_is_no_shape():
    """Nor does it count as the shape that it is likest."""
    height, width = SIZES[4]
    y, x = np.mgrid[:height, :width]
    blot = (abs(x - 120) < 8) & (abs(y - 120) < 60) | (abs(x - 150) < 30) & (abs(y - 175) < 6)
    (found,) = read(np.where(blot[..., None], COLOURS["red"], COLOURS["white"]).astype(np.uint8)).shapes
    assert (found.colour, found.shape) == ("red", UNCLEAR)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_split_is_kept(held_out: bool):
    """Held out is the main part's combination, and nothing else of any scene."""
    for scene in scenes(500, seed=1, held_out=held_out):
        main, *other = (is_held_out(*combination) for combination in combinations(scene))
        assert main == held_out and not any(other)


def test_a_tenth_is_held_out():
    triples = [(c, s, b) for c in COLOURS for s in SHAPES for b in COLOURS if b != c]
    share = sum(is_held_out(*triple) for triple in triples) / len(triples)
    assert 0.07 < share < 0.13


@pytest.mark.parametrize("phrased", [True, False])
def test_captions_say_what_pictures_show(phrased: bool):
    rng = random.Random(2)
    for scene in scenes(400, seed=2, held_out=False):
        text = f" {caption(scene, rng) if phrased else plain_caption(scene)} ".lower()
        assert scene.background.colour in text and (scene.background.second or "") in text
        assert (scene.relation or "") in text
        for part in (scene.main, scene.other):
            if isinstance(part, Word):
                assert f'"{part.text.lower()}"' in text and part.colour in text
            elif part is not None:
                number = {1: (" a ", " an ", " one "), 2: (" two ", " 2 "), 3: (" three ", " 3 ")}[part.count]
                assert any(each in text for each in number), text
                assert (
                    f"{part.colour} {part.shape}{'s' if part.count > 1 and part.shape != 'cross' else ''}"
                    in text
                )
        if not phrased:
            assert all(part.size in text for part in (scene.main, scene.other) if isinstance(part, Group))


def test_pictures_are_the_same_for_a_seed_alone_or_together():
    size = SIZES[2]
    batches = [
        collate([sample_scene(rng, size=size) for _ in range(8)])
        for rng in (random.Random(3), random.Random(3))
    ]
    first, second = (render(batch, *size) for batch in batches)
    assert (first == second).all()
    alone = render({name: value[5:6] for name, value in batches[0].items()}, *size)
    assert np.abs(to_uint8(alone)[0].numpy().astype(int) - to_uint8(first)[5].numpy()).max() <= 1


def test_sizes_are_the_nine_of_base_256():
    assert sorted(SIZES) == sorted(BUCKETS[256].values())
    assert {(scene.height, scene.width) for scene in scenes(9)} == set(SIZES)
    for size, one in zip(SIZES, scenes(9), strict=True):
        assert picture(one).shape == (*size, 3)
    drawn_sizes = {(s.height, s.width) for s in (sample_scene(rng) for rng in [random.Random(4)] * 200)}
    assert drawn_sizes == set(SIZES)


def inside(scene: Scene) -> list[tuple[int, tuple[float, float, float, float]]]:
    """How many places each part has, and the half of the picture (left, top, right, bottom) it belongs to."""
    height, width = scene.height, scene.width
    halves = {
        "left of": (0, 0, width / 2, height),
        "right of": (width / 2, 0, width, height),
        "above": (0, 0, width, height / 2),
        "below": (0, height / 2, width, height),
    }
    parts = [scene.main] if scene.other is None else [scene.main, scene.other]
    boxes = [(0, 0, width, height)]
    if scene.relation is not None:
        boxes = [halves[scene.relation], halves[OPPOSITE[scene.relation]]]
    return [(getattr(part, "count", 1), box) for part, box in zip(parts, boxes, strict=True)]


def test_groups_stand_together_near_the_middle_of_their_half():
    """Within a cell of 8 pixels, a margin of 4 on every side, and 8 between two of a group."""
    for scene in scenes(900, seed=6):
        start = 0
        for count, (left, top, right, bottom) in inside(scene):
            places = scene.places[start : start + count]
            start += count
            xs, ys = [place.x for place in places], [place.y for place in places]
            # A half's inside has the picture's margin on one side and less in the middle: 1 pixel more.
            assert abs((min(xs) + max(xs) - left - right) / 2) <= 9
            assert abs((min(ys) + max(ys) - top - bottom) / 2) <= 9
            if not isinstance(scene.main if start == count else scene.other, Group):
                continue
            reach = places[0].across / 2 + 4
            assert left <= min(xs) - reach and max(xs) + reach <= right
            assert top <= min(ys) - reach and max(ys) + reach <= bottom
            for one, other in pairwise(places):
                apart = max(abs(one.x - other.x), abs(one.y - other.y)) - one.across
                assert apart in (8, 16)
        assert start == len(scene.places)


def test_nothing_is_drawn_in_a_colour_that_its_background_has():
    for scene in scenes(500, seed=5, held_out=False):
        ground = scene.background
        taken = {ground.colour, ground.second}
        if ground.second is not None:
            first, second = sorted((ground.colour, ground.second))
            taken |= {*GRADIENTS[first, second]}
        assert not taken & {part.colour for part in (scene.main, scene.other) if part is not None}


@pytest.mark.parametrize("font", FONTS)
def test_letters_stand_evenly(font: str):
    """The gaps between a word's letters differ by less than the grid they stand on, whatever space a font
    leaves around each."""
    word = Word("EXIT", font, "black")
    scene = Scene(176, 352, Background("white"), word, None, None, (Place(170, 88, 50, NONE),), NONE)
    inked = (picture(scene) < 128).any((0, 2))
    edges = np.flatnonzero(np.diff(inked.astype(int)))
    gaps = (edges[2::2] - edges[1:-1:2]).tolist()
    assert len(gaps) == 3 and max(gaps) - min(gaps) < ADVANCE, gaps
