"""LensTextEncode's prompts as a batch: each row is drawn as its prompt alone would be."""

from __future__ import annotations

import pytest
import torch

from tests.compare import relative_l2

# Longest in the middle, so that the first and the last are padded.
PROMPTS = ["a red circle", "the image of a blue square and a red circle", "blue"]
ROWS = torch.linspace(-1, 1, 3 * 128 * 6 * 4).reshape(3, 128, 6, 4)


@pytest.mark.parametrize(
    ("text", "several", "expected"),
    [
        ("a\nb | c", "one prompt", ["a\nb | c"]),
        (" a \n\n b | c\r\n", "one a line", ["a", "b | c"]),
        ("a\nb | c||", "split at |", ["a\nb", "c"]),
        ("{red|blue} (x:1.2)", "one a line", ["{red|blue} (x:1.2)"]),
        (" \n ", "one a line", [" \n "]),
        ("|", "split at |", ["|"]),
    ],
)
def test_how_a_text_is_split(host, text: str, several: str, expected: list[str]):
    assert host.module("nodes.host.conditioning").split_prompts(text, several) == expected


def test_an_unknown_way_to_split(host, tiny):
    with pytest.raises(Exception, match="several is 'words'"):
        host.run("LensTextEncode", clip=tiny.clip, prompt="a", several="words")


@pytest.mark.parametrize("own", [True, False], ids=["our CLIP", "ComfyUI's"])
def test_each_row_is_drawn_as_its_prompt_alone(host, tiny, stock_clip, draw, own: bool):
    clip = tiny.clip if own else stock_clip

    def encode(text: str, **options):
        return host.run("LensTextEncode", clip=clip, prompt=text, **options)[0]

    batch = encode("\n".join(PROMPTS), several="one a line")
    ((features, details),) = batch
    assert features.shape[0] == 3
    assert details["attention_mask"].shape == features.shape[:2]
    # denoise below 1 begins from these latents; each picture has noise of its own, by its place in the batch.
    settings = {"latent": {"samples": ROWS}, "denoise": 0.5, "cfg": 3.0}
    got = draw(positive=batch, **settings)["samples"]
    for row, prompt in enumerate(PROMPTS):
        alone = draw(positive=encode(prompt), **settings)["samples"]
        assert relative_l2(got[row], alone[row]) < 1e-5  # fp32; the masked attention sums in another order
    others = draw(positive=encode(PROMPTS[1]), **settings)["samples"]
    assert relative_l2(got[0], others[0]) > 1e-3


def test_prompts_of_one_length_need_no_mask(host, tiny):
    (((features, details),), _) = host.run(
        "LensTextEncode", clip=tiny.clip, prompt="red|red", several="split at |"
    )
    assert features.shape[0] == 2 and "attention_mask" not in details
    assert torch.equal(features[0], features[1])


def test_the_node_says_which_batch_size(host, tiny, monkeypatch):
    module = host.module("nodes.host.conditioning")
    said: list[str] = []
    monkeypatch.setattr(module, "say", lambda text, node_id: said.append(text))
    host.run("LensTextEncode", clip=tiny.clip, prompt="a|b", several="split at |")
    assert said[0].startswith("2 prompts: set the latent's batch_size to 2.\n")
