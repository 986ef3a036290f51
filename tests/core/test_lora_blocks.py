"""Strengths of a LoRA by block and stream: what a text means, and what is wrong with others."""

from __future__ import annotations

import pytest

from lens_core.config import DenoiserConfig
from lens_core.denoiser import LensDenoiser
from lens_core.errors import SettingError
from lens_core.lora.blocks import parse_block_strengths, strength_of
from lens_core.quantized import linear_sizes

IMG, TXT = "transformer_blocks.{}.img_mlp.w1", "transformer_blocks.{}.attn.txt_qkv"
OUTSIDE, TEXT_IN, TIME = "proj_out", "txt_in", "time_text_embed.timestep_embedder.linear_1"


def strengths(text: str, *layers: str) -> list[float]:
    entries = parse_block_strengths(text, 48)
    return [strength_of(layer, entries) for layer in layers]


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("", [IMG.format(0), OUTSIDE], [1, 1]),
        ("0-11: 0.5, 12-47: 2", [IMG.format(n) for n in (0, 11, 12, 47)] + [OUTSIDE], [0.5, 0.5, 2, 2, 1]),
        ("7:-1", [IMG.format(n) for n in (6, 7, 8)], [1, -1, 1]),
        ("1: 0.25", [IMG.format(1), IMG.format(10), IMG.format(11)], [0.25, 1, 1]),
        ("0-47: 0.8, txt: 0", [IMG.format(3), TXT.format(3), TEXT_IN, OUTSIDE], [0.8, 0, 0, 1]),
        ("txt: 0, 0-47: 0.8", [IMG.format(3), TXT.format(3), TEXT_IN], [0.8, 0.8, 0]),
        ("all: 0\nimg 12 - 20 : 1", [IMG.format(12), TXT.format(12), IMG.format(21), TIME], [1, 0, 0, 0]),
        ("img: 0; txt: 0", [IMG.format(0), TXT.format(0), OUTSIDE, TIME], [0, 0, 0, 1]),
        (" ALL:.5 ,", [TIME], [0.5]),
    ],
)
def test_what_a_text_means(text, layers, expected):
    assert strengths(text, *layers) == expected


def test_each_layer_of_a_block_is_in_one_stream():
    """All but time's embedding: the text's by name, the rest the image's."""
    layers = list(linear_sizes(LensDenoiser(DenoiserConfig(num_layers=1), device="meta")))
    text = [layer for layer in layers if strengths("txt: 0", layer) == [0]]
    image = [layer for layer in layers if strengths("img: 0", layer) == [0]]
    assert not set(text) & set(image)
    assert [layer for layer in layers if layer not in (*text, *image)] == [
        f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)
    ]
    block = "transformer_blocks.0"
    own = ("attn.txt_qkv", "attn.to_add_out", "txt_mod.1", "txt_mlp.w1", "txt_mlp.w2", "txt_mlp.w3")
    assert sorted(text) == sorted(["txt_in", *(f"{block}.{name}" for name in own)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-11 0.5", "'0-11 0.5' is not understood"),
        ("0-11: 0,5", "'5' is not understood"),
        ("vid: 1", "'vid: 1' is not understood"),
        (": 1", "': 1' is not understood"),
        ("all 3: 1", "'all 3: 1' is not understood"),
        ("0-48: 1", "names blocks 0 to 48; this model has 0 to 47"),
        ("9-3: 1", "names blocks 9 to 3; this model has 0 to 47"),
        ("txt: much", "'txt: much' needs a number after the colon"),
        ("txt:", "'txt:' needs a number after the colon"),
        ("1: inf", "'1: inf' needs a number after the colon"),
    ],
)
def test_what_is_not_understood_is_said(text, message):
    with pytest.raises(SettingError, match="block_strengths") as caught:
        parse_block_strengths(text, 48)
    assert message in str(caught.value)
