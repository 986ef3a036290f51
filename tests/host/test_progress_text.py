"""What nodes say while they work: each phase in a line, few of them, and a last one that stays."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

NAME = "gpt_oss_tiny_mxfp4.safetensors"


@pytest.fixture
def node(host):
    """A node class as ComfyUI runs it: with its id, 7."""
    from comfy_api.latest import io

    def prepared(name: str):
        hidden = {"hidden_inputs": {io.Hidden.unique_id: "7"}}
        return host.node_classes[name].PREPARE_CLASS_CLONE(hidden)

    return prepared


@pytest.fixture
def progress_module(host):
    return host.module("nodes.host.progress")


@pytest.fixture
def every_line(progress_module, monkeypatch):
    """No line comes too soon."""
    monkeypatch.setattr(progress_module, "_PAUSE", 0)


@pytest.mark.parametrize(
    "name, words",
    [("Lens-tiny", r"Loading [12]/2 shards"), ("lens_tiny_bf16.safetensors", r"Loading, \d+ %")],
)
def test_loading_a_denoiser(node, said, every_line, name, words):
    node("LensModelLoader").execute(model_name=name, dtype="float32")
    *lines, last = said
    assert lines and all(re.fullmatch(words, line) for line in lines)
    assert re.fullmatch(r"Lens: 20 steps, cfg 5\. 8 MB", last)


@pytest.mark.parametrize("size, words", [(8_100_000, "8 MB"), (7_740_000_000, "7.7 GB")])
def test_the_size_of_a_model(progress_module, size, words):
    assert progress_module.size_in_words(size) == words


def test_shards_are_counted_in_reading_order(progress_module):
    header = {str(index): SimpleNamespace(path=f"{'abc'[index // 4]}.safetensors") for index in range(12)}
    words = progress_module.loading(SimpleNamespace(header=header))
    assert [words(done, 12) for done in (1, 4, 5, 8, 9, 12)] == [
        f"Loading {shard}/3 shards" for shard in (1, 1, 2, 2, 3, 3)
    ]


def test_encoding(host, node, said, every_line):
    (clip,) = host.run("LensEncoderLoader", encoder_name=NAME, feature_cache=False)
    node("LensTextEncode").execute(clip=clip, prompt="a red circle")
    count, *lines, last = said
    assert last == count and " tokens" in count
    assert any(line.startswith("Loading") for line in lines)
    layers = [line for line in lines if line.startswith("Encoding: layer ")]
    assert len(layers) == len(set(layers)) > 3 and layers[-1].split()[-1] == f"{len(layers)}/{len(layers)}"


def sample(node, tiny, **changes):
    inputs = {"model": tiny.model, "positive": tiny.positive, "negative": tiny.negative}
    inputs |= {"latent": {"samples": torch.zeros(1, 128, 6, 4)}, "seed": 1, "steps": 4, "cfg": 5.0}
    inputs |= {"noise": "host", "denoise": 1.0}
    node("LensSampler").execute(**{**inputs, **changes})


def test_steps_and_what_the_run_took(node, tiny, said, every_line):
    sample(node, tiny)
    first, *middle, full, last = said
    assert (first, full) == ("Step 1/4", "Step 4/4")
    assert len(middle) == 2 and all(re.fullmatch(r"Step [23]/4, \d+ s left", line) for line in middle)
    assert re.fullmatch(r"64x96, 4 steps, \d+\.\d s", last), "and no peak on a CPU"
    said.clear()
    sample(node, tiny, latent={"samples": torch.zeros(2, 128, 6, 4)}, steps=1)
    assert re.fullmatch(r"2 x 64x96, 1 step, \d+\.\d s", said[-1])


def test_decoding(node, tiny, said, every_line):
    node("LensVAEDecode").execute(latent={"samples": torch.zeros(1, 128, 6, 4)}, vae=tiny.vae)
    first, *strips, last = said
    assert first == "Decoding" and strips == [
        f"Decoding: strip {count}" for count in range(1, len(strips) + 1)
    ]
    assert strips and re.fullmatch(r"64x96, \d+\.\d s", last)


def test_at_most_four_lines_a_second(progress_module, said, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with progress_module.telling("7") as lines:
        for count in range(100):
            clock.now = 100 + count / 50
            progress_module.tell(str(count))
    assert lines.told and 6 <= len(said) <= 8 and said[0] == "0"


def test_other_packs_nodes_are_told_nothing(progress_module, host, said, ksampler, every_line):
    ksampler()
    progress_module.tell("a line")
    assert said == []


def test_seconds_left_leave_the_first_step_out(host, monkeypatch):
    """It has the loading in it."""
    module, clock = host.module("nodes.host.steps"), SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    steps, lines = module.Steps(torch.device("cpu")), []
    for done, clock.now in ((1, 60.0), (2, 61.0), (7, 66.0), (20, 79.0)):
        lines.append(steps.line(done, 20))
    assert lines == ["Step 1/20", "Step 2/20, 18 s left", "Step 7/20, 13 s left", "Step 20/20"]
    # A run that begins anew, with less memory.
    for done, clock.now in ((1, 200.0), (2, 202.0)):
        lines.append(steps.line(done, 20))
    assert lines[-1] == "Step 2/20, 36 s left"


def test_the_peak_is_the_most_that_was_in_use(host, monkeypatch):
    module, free = host.module("nodes.host.steps"), iter([15e9, 10e9, 14e9])
    monkeypatch.setattr(module.torch.cuda, "mem_get_info", lambda device: (next(free), 20e9))
    steps = module.Steps(torch.device("cuda", 0))
    for done in (1, 2):
        steps.line(done, 2)
    assert steps.summary(torch.zeros(1, 128, 4, 4)).endswith(" s, 10.0 GB peak")


@pytest.mark.parametrize(
    "content, limit",
    [
        (None, 1.0),
        ({"Lens.FeatureCacheGB": 2.5}, 2.5),
        ({"Lens.FeatureCacheGB": 0}, 0.0),
        *(({"Lens.FeatureCacheGB": value}, 1.0) for value in (-1, "3", True, None, 1e9, [2], float("nan"))),
        ([], 1.0),
        ("{", 1.0),
    ],
    ids=str,
)
def test_the_settings_limit_of_the_feature_cache(host, tmp_path, monkeypatch, content, limit):
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    if content is not None:
        (tmp_path / "default").mkdir()
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "default" / "comfy.settings.json").write_text(text)
    cache = host.module("nodes.host.feature_cache").feature_cache()
    cache.put("ab" * 32, torch.zeros(1, 2, 4, 8))
    assert cache.max_bytes == limit * 2**30
    assert cache.count() == (1 if limit else 0)


def test_a_limit_of_0_lets_go_of_what_was_kept(host, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    cache = host.module("nodes.host.feature_cache").feature_cache()
    cache.put("ab" * 32, torch.zeros(1, 2, 4, 8))
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "comfy.settings.json").write_text('{"Lens.FeatureCacheGB": 0}')
    cache.put("cd" * 32, torch.zeros(1, 2, 4, 8))
    assert cache.count() == 0
