"""Features kept on disk, through the nodes: a prompt seen before loads nothing, anything else encodes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

NAME = "gpt_oss_tiny_mxfp4.safetensors"
PROMPT = "a very secret circle"


@pytest.fixture
def user(host, tmp_path, monkeypatch):
    """A user folder of the test's own; returns where features are to be."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    assert folder_paths.get_user_directory() == str(tmp_path)
    return tmp_path / "__lens" / "features"


class Work:
    """What was done: encoder runs, files read, and loads that ComfyUI was asked for."""

    def __init__(self) -> None:
        self.runs = self.reads = self.loads = 0

    def take(self) -> tuple[int, int, int]:
        done = self.runs, self.reads, self.loads
        self.__init__()
        return done


NOTHING = (0, 0, 0)


@pytest.fixture
def work(host, monkeypatch):
    import comfy.model_management as management

    seen = Work()
    encoder = host.module("lens_core.encoder.gpt_oss").GptOssEncoder
    file = host.module("lens_core.encoder_file").EncoderFile

    def counted(real, count: str):
        def spy(*arguments, **settings):
            setattr(seen, count, getattr(seen, count) + 1)
            return real(*arguments, **settings)

        return spy

    for owner, name, count in (
        (encoder, "forward", "runs"),
        (file, "load", "reads"),
        (management, "load_models_gpu", "loads"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), count))
    return seen


@pytest.fixture
def load(host):
    """A freshly loaded encoder, as after a restart: it shares nothing with those before but the disk."""

    def run(name=NAME, **settings):
        (clip,) = host.run("LensEncoderLoader", encoder_name=name, **settings)
        return clip

    return run


@pytest.fixture
def encode(host):
    def run(clip, prompt=PROMPT, negative="", **settings):
        positive, _ = host.run("LensTextEncode", clip=clip, prompt=prompt, negative=negative, **settings)
        return positive[0][0]

    return run


def test_a_prompt_seen_before_loads_nothing(host, user, work, load, encode):
    clip = load()
    want = encode(clip)
    assert work.take() == (1, 1, 1), "the blank negative must cost nothing"
    assert [path.suffix for path in user.iterdir()] == [".safetensors"]
    assert torch.equal(encode(clip), want)
    assert work.take() == NOTHING
    restarted = load()
    assert torch.equal(encode(restarted), want)
    (conditioning,) = host.run("CLIPTextEncode", clip=restarted, text=PROMPT)
    assert torch.equal(conditioning[0][0], want) and work.take() == NOTHING
    assert not restarted.cond_stage_model.text.is_read
    assert conditioning[0][1].keys() == {"pooled_output", "num_layers_stacked"}


def test_stock_nodes_fill_the_cache_too(host, user, work, load, encode):
    (conditioning,) = host.run("CLIPTextEncode", clip=load(), text=PROMPT)
    assert work.take() == (1, 1, 1)
    assert torch.equal(encode(load()), conditioning[0][0]) and work.take() == NOTHING


def test_only_what_is_new_is_encoded(host, user, work, load, encode):
    clip = load()
    encode(clip)
    work.take()
    encode(clip, negative="blue")
    assert work.take() == (1, 0, 1)
    positive, negative = host.run("LensTextEncode", clip=load(), prompt="blue", negative=PROMPT)
    assert work.take() == NOTHING and len(list(user.iterdir())) == 2
    assert positive[0][0].shape[1] < negative[0][0].shape[1]


@pytest.mark.parametrize(
    "loader, settings",
    [
        ({}, {"prompt": PROMPT + "."}),
        ({}, {"template_date": "today"}),
        ({}, {"prompt": "x" * 70, "extended": True}),
        ({"name": "gpt_oss_tiny_nvfp4.safetensors"}, {}),
        ({"name": "Lens-tiny"}, {}),
    ],
    ids=["prompt", "date", "extended", "nvfp4", "folder"],
)
def test_anything_else_is_encoded_anew(user, work, load, encode, loader, settings):
    encode(load(), **({"prompt": settings["prompt"]} if "extended" in settings else {}))
    work.take()
    encode(load(**loader), **settings)
    assert work.take() == (1, 1, 1)
    encode(load(**loader), **settings)
    assert work.take() == NOTHING


def test_another_file_of_the_same_name_is_encoded_anew(user, work, load, encode, own_models, tiny_models):
    file = own_models / "text_encoders" / "replaced.safetensors"
    shutil.copy(tiny_models / "text_encoders" / NAME, file)
    before = encode(load("replaced.safetensors"))
    content = bytearray(file.read_bytes())
    middle = len(content) // 2  # among the experts' bytes
    content[middle : middle + 1000] = bytes(1000)
    file.write_bytes(content)
    work.take()
    after = encode(load("replaced.safetensors"))
    assert work.take() == (1, 1, 1) and after.shape == before.shape


def test_dense_experts_have_features_of_their_own(user, work, load, encode, monkeypatch):
    from tests.host.fake_gpu import FakeGpu

    FakeGpu(1 << 40).install(monkeypatch)
    encode(load())
    work.take()
    dense = load(experts="bfloat16")
    encode(dense)
    assert work.take() == (1, 1, 1)
    encode(load())
    encode(load(experts="bfloat16"))
    assert work.take() == NOTHING


@pytest.mark.parametrize("placement", ["auto", "gpu", "stream", "cpu"])
def test_features_are_the_same_wherever_they_were_encoded(user, work, load, encode, placement):
    want = encode(load())
    work.take()
    assert torch.equal(encode(load(placement=placement)), want) and work.take() == NOTHING


def test_switched_off_it_neither_writes_nor_reads(user, work, load, encode):
    encode(load(feature_cache=False))
    assert not user.exists()
    encode(load())
    [entry] = user.iterdir()
    stamp = entry.stat().st_mtime_ns
    work.take()
    encode(load(feature_cache=False))
    assert work.take() == (1, 1, 1) and entry.stat().st_mtime_ns == stamp


def test_the_prompt_is_nowhere(user, load, encode):
    """In neither names nor contents."""
    encode(load(), negative="hidden words")
    files = [path for path in user.parent.parent.rglob("*") if path.is_file()]
    assert len(files) == 2
    for path in files:
        content = path.read_bytes().lower()
        for word in ("secret", "hidden", "circle", "words"):
            assert word not in str(path.relative_to(user)) and word.encode() not in content


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-40] + bytes(40),
        lambda data: b"not a safetensors file",
    ],
    ids=["empty", "cut", "zeros", "other"],
)
def test_damaged_entries_are_encoded_anew(user, work, load, encode, caplog, damage):
    want = encode(load())
    [entry] = user.iterdir()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    work.take()
    assert torch.equal(encode(load()), want)
    assert work.take() == (1, 1, 1) and "is damaged and is deleted" in caplog.text
    assert torch.equal(encode(load()), want) and work.take() == NOTHING


def test_a_folder_that_cannot_be_written(user, work, load, encode, caplog):
    """A file is where the folder should be: the picture is drawn all the same, with one warning."""
    user.parent.mkdir(parents=True)
    user.write_text("in the way")
    clip = load()
    assert torch.equal(encode(clip), encode(clip)) and work.take() == (2, 1, 2)
    assert caplog.text.count("cannot be kept in") == 1


@pytest.fixture
def said(host, monkeypatch):
    """What the page is told, and a node's class as ComfyUI runs it: with its id."""
    from server import PromptServer

    lines: list[tuple[str, str]] = []

    class Page:
        def send_progress_text(self, text, node_id, sid=None) -> None:
            lines.append((text, node_id))

    monkeypatch.setattr(PromptServer, "instance", Page(), raising=False)
    return lines


def run_with_id(host, node_id: str, **inputs):
    from comfy_api.latest import io

    node = host.node_classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "7"}})
    return node.execute(**inputs)


def test_clearing(host, user, work, load, encode, said):
    run_with_id(host, "LensClearFeatureCache")
    assert said.pop() == ("0.0 MB of text features deleted.", "7")
    want = encode(load(), negative="blue")
    other = user / "notes.txt"
    other.write_text("not ours")
    size = sum(path.stat().st_size for path in user.glob("*.safetensors"))
    assert size > 100_000
    run_with_id(host, "LensClearFeatureCache")
    assert said.pop() == (f"{size / 1e6:.1f} MB of text features deleted.", "7")
    assert list(user.iterdir()) == [other]
    work.take()
    assert torch.equal(encode(load()), want) and work.take() == (1, 1, 1)


def test_clearing_works_each_time(host):
    """ComfyUI skips a node whose inputs and fingerprint have not changed."""
    node = host.node_classes["LensClearFeatureCache"]
    first, second = node.fingerprint_inputs(), node.fingerprint_inputs()
    assert first != second and node.OUTPUT_NODE


def test_blank_prompts_need_neither_cache_nor_encoder(host, user, work, load):
    clip = load()
    for node, inputs in (("CLIPTextEncode", {"text": " \n"}), ("CLIPTextEncode", {"text": ""})):
        (conditioning,) = host.run(node, clip=clip, **inputs)
        assert conditioning[0][0].shape[:2] == (1, 0)
    assert work.take() == NOTHING and not user.exists() and not Path(user.parent).exists()


def test_schedules_take_one_features_for_every_keyframe(user, work, load, encode):
    """With hooks CLIP loads once and asks for the features at each keyframe."""
    encode(load())
    clip = load()
    tokens = clip.tokenize(PROMPT)
    work.take()
    clip.load_model(tokens)
    first, second = (clip.cond_stage_model.encode_token_weights(tokens)[0] for _ in range(2))
    assert torch.equal(first, second) and work.take() == NOTHING
    clip.cond_stage_model.reset_clip_options()
    clip.cond_stage_model.encode_token_weights(clip.tokenize("another"))
    assert work.take()[0] == 1
