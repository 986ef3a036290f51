"""LensReasoner: what it writes, shows and takes of the GPU, and how it ends."""

from __future__ import annotations

import pytest
import torch

from tests.host.fake_gpu import GPU, FakeGpu, resident_bytes

NAME = "gpt_oss_tiny_mxfp4.safetensors"
SHORT = {"preset": "short", "seed": 3, "temperature": 0.7, "max_new_tokens": 16, "effort": "none"}


@pytest.fixture(autouse=True)
def _brief_rules(host, monkeypatch):
    """The tiny tokenizer has a token for every letter of the presets' texts."""
    monkeypatch.setitem(host.module("lens_core.reasoner").PRESETS, "short", "Rewrite.")


@pytest.fixture
def write(host, monkeypatch):
    """LensReasoner as ComfyUI runs it, with an id; every text is shown."""
    from comfy_api.latest import io

    monkeypatch.setattr(host.module("nodes.host.reasoner"), "_INTERVAL", 0)
    node = host.node_classes["LensReasoner"].PREPARE_CLASS_CLONE(
        {"hidden_inputs": {io.Hidden.unique_id: "7"}}
    )

    def run(clip, prompt="a cat", **settings):
        return node.execute(clip=clip, prompt=prompt, **{**SHORT, **settings}).result[0]

    return run


@pytest.fixture
def load(host):
    def run(**settings):
        (clip,) = host.run("LensEncoderLoader", **{"encoder_name": NAME, "feature_cache": False, **settings})
        return clip

    return run


def test_it_writes_and_shows_it(tiny, write, said, progress):
    text = write(tiny.clip)
    assert text and text == write(tiny.clip) != write(tiny.clip, seed=4)
    first = said[: said.index(next(line for line in said if "cut at 16 tokens" in line)) + 1]
    assert first[-1].endswith(f"\n\n{text}")
    lengths = [len(line) for line in first[:-1]]
    assert len(lengths) == 16 and lengths == sorted(lengths) and lengths[-1] > lengths[0]
    assert [(done, total) for done, total, _ in progress if total == 16][:16] == [
        (n, 16) for n in range(1, 17)
    ]
    assert tiny.clip.cond_stage_model.text.beside == 0


def test_reasoning_is_told_from_the_answer(tiny, write, said):
    assert write(tiny.clip, effort="low") == "a cat", "16 tokens of a random model have no final message"
    assert said[0].startswith("Thinking, 1 tokens: ") and "the prompt stays as it was" in said[-1]


def test_a_file_without_lm_head(load, write, said):
    clip = load(encoder_name="gpt_oss_tiny_nvfp4.safetensors")
    with pytest.raises(Exception, match=r"has no lm_head.*gpt-oss-20b of openai/gpt-oss-20b"):
        write(clip)
    assert not clip.cond_stage_model.text.is_read and not said


@pytest.mark.parametrize(
    "wrong, message", [({"clip": None}, "NoneType"), ({"prompt": 3}, "int; expected text")]
)
def test_what_is_no_clip_or_no_text(tiny, write, wrong, message):
    with pytest.raises(Exception, match=message):
        write(**{"clip": tiny.clip, **wrong})


def test_a_blank_prompt_loads_nothing(load, write, said):
    clip = load()
    assert write(clip, prompt=" \n") == " \n"
    assert not clip.cond_stage_model.text.is_read and "blank" in said[-1]


# How many layers the manager leaves room for beside what writing asks for -> how many it gets.
@pytest.mark.parametrize("room, resident", [(0, 0), (8, 6), (24, 24)])
def test_room_is_made_for_the_head(host, load, write, management, monkeypatch, room, resident):
    """Resident, in part or streamed: the same text; while it is written the head is counted."""
    module = host.module("nodes.host.reasoner")
    gpu, clip = FakeGpu(1 << 40).install(monkeypatch), load()
    gpu.encoders.append(clip.patcher)
    options = module.LocalOptions(module.LocalOptions().sampling, 16, "none")
    text = clip.cond_stage_model.text
    working = module.working_bytes(text, "a cat", "short", options)
    assert working > 2 * text.file.config.vocab_size * text.file.config.hidden_size
    size = text.layers.sizes[0]
    gpu.capacity = text.layers.buffers + working + room * size
    counted = []
    real = module.rewrite_locally

    def spy(*args, **kwargs):
        shown = kwargs["on_text"]
        kwargs["on_text"] = lambda *call: (counted.append(clip.patcher.loaded_size()), shown(*call))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "rewrite_locally", spy)
    got = write(clip)
    assert clip.patcher.load_device == GPU
    assert resident_bytes(clip.patcher) == clip.patcher.loaded_size() == resident * size
    head = 2 * text.file.config.hidden_size * (text.file.config.vocab_size + 1)
    assert set(counted) == {resident * size + head}
    monkeypatch.setattr(module, "rewrite_locally", real)
    gpu.capacity = 1 << 40
    assert got == write(load())


def test_cancel(host, load, write, management, progress):
    """Within a layer of a token, wherever it is; nothing stays but the encoder's own layers."""
    import comfy.utils

    def press(done, total, preview, node_id=None):
        if (done, total) == (3, 16):
            management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(press)
    clip = load()
    layers = []
    clip.cond_stage_model.text.read()
    for layer in clip.cond_stage_model.text.model.layers:
        layer.register_forward_hook(lambda *_: layers.append(1))
    with pytest.raises(management.InterruptProcessingException):
        write(clip)
    # The prompt's run and two steps; the next ends with its first layer.
    assert len(layers) <= 3 * 24 + 1 and clip.cond_stage_model.text.beside == 0
    comfy.utils.set_progress_bar_global_hook(None)
    assert write(clip)


def test_out_of_memory_streams(load, write, management, monkeypatch):
    clip = load()
    text, calls = clip.cond_stage_model.text, []
    want = write(clip)
    real = text.file.load_head

    def fails(*args, **kwargs):
        calls.append(clip.cond_stage_model.placement)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(text.file, "load_head", fails)
    assert write(clip) == want and calls == ["auto", "stream"]
