"""LensTextEncode's options and what it shows; encoder files in every format, and their tokenizers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lens_core.tiny.tokenizer import tiny_tokenizer
from tests import encoder_files as files
from tests.compare import relative_l2
from tests.host.conftest import PROMPT

NAME = "gpt_oss_tiny_mxfp4.safetensors"
# The tiny template takes more of the 512 tokens than GPT-OSS's: this prompt fits in neither.
LONG = " ".join(f"word{index}" for index in range(120))


@pytest.fixture
def encode(host):
    """LensTextEncode as ComfyUI runs it, with an id: (positive, negative) features."""
    from comfy_api.latest import io

    node = host.node_classes["LensTextEncode"].PREPARE_CLASS_CLONE(
        {"hidden_inputs": {io.Hidden.unique_id: "7"}}
    )

    def run(clip, prompt=PROMPT, negative="", **settings):
        positive, negative = node.execute(clip=clip, prompt=prompt, negative=negative, **settings).result
        return positive[0][0], negative[0][0]

    return run


@pytest.fixture
def tokens(tiny):
    """(prompt's own tokens, most that fit, closing tokens)."""
    tokenizer = tiny.clip.tokenizer.tokenizer
    return tokenizer.count(LONG), tokenizer.max_prompt_tokens, len(tokenizer.suffix)


def test_a_prompt_that_fits_is_counted(tiny, encode, said):
    count, most = tiny.clip.tokenizer.tokenizer.count(PROMPT), tiny.clip.tokenizer.tokenizer.max_prompt_tokens
    encode(tiny.clip)
    assert said[-1:] == [f"{count} of {most} tokens"]


def test_a_cut_is_shown_on_the_node(tiny, encode, said, tokens, caplog):
    total, most, closing = tokens
    positive, _ = encode(tiny.clip, LONG)
    kept = positive.shape[1] - closing
    assert kept <= most < total
    line = said[-1]
    first = LONG[len(tiny.clip.decode(ids_of(tiny.clip, LONG)[-closing - kept : -closing])) :].split()[0]
    assert (
        line == f"Cut: {total - kept} of {total} tokens left out, from \u201c{following(first)} \u2026\u201d"
    )
    assert caplog.text.count("are left out, beginning with") == 1, "said twice"


def ids_of(clip, prompt: str, **options) -> list[int]:
    return [token for token, _ in clip.tokenize(prompt, **options)["gpt_oss"][0]]


def following(first: str) -> str:
    words = LONG.split()
    start = words.index(first)
    return " ".join(words[start : start + 6])


def test_a_cut_negative_is_shown_too(tiny, encode, said):
    encode(tiny.clip, PROMPT, LONG)
    line = said[-1]
    first, second = line.split("\n")
    assert " tokens" in first and second.startswith("Negative: Cut: ")


def test_extended_lets_long_prompts_through(tiny, encode, said, tokens):
    total, most, closing = tokens
    positive, negative = encode(tiny.clip, LONG, LONG, extended=True)
    assert positive.shape[1] == negative.shape[1] == total + closing
    assert said[-1:] == [f"{total} of {most} tokens (beyond what Lens was trained with)"]
    assert torch.equal(positive, negative)


def test_extended_changes_nothing_for_short_prompts(tiny, encode):
    assert torch.equal(encode(tiny.clip, extended=True)[0], tiny.positive[0][0])


@pytest.fixture
def calendar(host, monkeypatch):
    """Sets the date that the pack takes for today's."""
    module = host.module("nodes.host.conditioning")

    def turn(date: str) -> None:
        monkeypatch.setattr(module, "today", lambda: date)

    return turn


def test_todays_date_is_in_the_template(host, tiny, encode, calendar):
    node = host.node_classes["LensTextEncode"]
    results, prints = {}, {}
    for date in ("2031-01-02", "2031-01-03"):
        calendar(date)
        results[date] = encode(tiny.clip, negative="blue", template_date="today")
        prints[date] = node.fingerprint_inputs(template_date="today", prompt="x", clip=None)
        assert torch.equal(encode(tiny.clip, template_date="pinned")[0], tiny.positive[0][0])
        assert date in tiny.clip.decode(ids_of(tiny.clip, PROMPT, date=date))
    (one, blue), (other, other_blue) = results.values()
    assert relative_l2(one, other) > 1e-4 and relative_l2(blue, other_blue) > 1e-4
    assert relative_l2(one, tiny.positive[0][0]) > 1e-4
    assert prints == {date: date for date in results}


def test_pinned_is_the_same_every_day(host, calendar):
    node = host.node_classes["LensTextEncode"]
    calendar("2031-01-02")
    before = node.fingerprint_inputs(template_date="pinned"), node.fingerprint_inputs()
    linked = node.fingerprint_inputs(template_date=None)
    calendar("2031-01-03")
    assert (node.fingerprint_inputs(template_date="pinned"), node.fingerprint_inputs()) == before
    assert node.fingerprint_inputs(template_date=None) != linked, "a linked value may say today"


def test_comfyuis_own_clip_takes_all_options(encode, stock_clip, said):
    want = encode(stock_clip)[0]
    assert said == [], "it says nothing of its tokens"
    got = encode(stock_clip, extended=True, template_date="today")[0]
    assert torch.equal(got, want)
    assert said == ["This CLIP knows neither extended nor template_date: they do nothing."]


@pytest.mark.parametrize(
    "node_id, inputs, words",
    [
        ("LensTextEncode", {"prompt": None}, ["The prompt is a NoneType", "expected text"]),
        ("LensTextEncode", {"negative": 3}, ["The negative is a int", "expected text"]),
        (
            "LensTextEncode",
            {"template_date": "2020-01-01"},
            ["template_date is '2020-01-01'", "pinned, today"],
        ),
        ("LensEncoderLoader", {"placement": "disk"}, ["placement is 'disk'", "auto, gpu, stream, cpu"]),
        ("LensEncoderLoader", {"experts": "fp8"}, ["experts is 'fp8'", "packed, bfloat16"]),
        ("LensEncoderLoader", {"placement": None}, ["placement is None", "auto, gpu"]),
        ("LensModelLoader", {"dtype": "float16"}, ["dtype is 'float16'", "auto, bfloat16, float32"]),
    ],
)
def test_values_through_links(host, tiny, node_id, inputs, words):
    """ComfyUI checks what a widget holds, but not what comes through a link."""
    usual = {
        "LensTextEncode": {"clip": tiny.clip, "prompt": "x"},
        "LensEncoderLoader": {"encoder_name": NAME},
        "LensModelLoader": {"model_name": "Lens-tiny"},
    }[node_id]
    with pytest.raises(Exception) as caught:
        host.run(node_id, **{**usual, **inputs})
    assert type(caught.value).__name__ == "SettingError"
    assert all(word in str(caught.value) for word in words), caught.value


FORMATS = {
    "original.safetensors": lambda path, weights: files.save(path, files.original(weights)),
    "comfy_bf16.safetensors": lambda path, weights: files.save(
        path, files.comfy_dense(weights, torch.bfloat16)
    ),
    "transformers_bf16.safetensors": lambda path, weights: files.save(
        path, files.dense(weights, torch.bfloat16)
    ),
    "rebundled_nvfp4.safetensors": lambda path, weights: files.save(
        path, files.comfy_nvfp4(weights, files.rebundled)
    ),
    "llama.cpp.gguf": lambda path, weights: files.write_gguf(
        path, weights, "BF16", tokenizer=json.loads(tiny_tokenizer().to_str())
    ),
}


@pytest.fixture(scope="module")
def weights(tiny_models):
    tensors = load_file(tiny_models / "text_encoders" / NAME)
    del tensors["tokenizer_json"]
    return tensors


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_encodes(host, tiny, own_models, weights, encode, name):
    """From the loader's list to features; all hold the same experts, so they are the same."""
    FORMATS[name](own_models / "text_encoders" / name, weights)
    options = host.node_classes["LensEncoderLoader"].GET_SCHEMA().inputs[0].options
    assert name in options
    (clip,) = host.run("LensEncoderLoader", encoder_name=name, feature_cache=False)
    assert clip.tokenize(PROMPT) == tiny.clip.tokenize(PROMPT)
    # Weights that lie elsewhere may be summed in another order.
    assert relative_l2(encode(clip)[0], tiny.positive[0][0]) < 1e-5


@pytest.mark.parametrize("name", ["Lens-tiny", "Lens-Turbo-tiny"])
def test_folders_encode(host, tiny, encode, name):
    (clip,) = host.run("LensEncoderLoader", encoder_name=name, feature_cache=False)
    assert relative_l2(encode(clip)[0], tiny.positive[0][0]) < 1e-5


def test_requantised_experts_encode(host, tiny, encode):
    """ComfyUI's nvfp4 file rounds the experts again: near, and not the same."""
    name = "gpt_oss_tiny_nvfp4.safetensors"
    (clip,) = host.run("LensEncoderLoader", encoder_name=name, feature_cache=False)
    features = encode(clip)[0]
    assert features.shape == tiny.positive[0][0].shape and features.isfinite().all()
    assert 1e-5 < relative_l2(features, tiny.positive[0][0]) < 0.5


@pytest.fixture
def places(host, own_models, monkeypatch, tmp_path, weights):
    """A models folder with one encoder that has no tokenizer, and nothing else."""
    import folder_paths

    for key in ("text_encoders", "lens"):
        (tmp_path / key).mkdir()
        _, extensions = folder_paths.folder_names_and_paths[key]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], extensions))
    files.save(tmp_path / "text_encoders" / "bare.safetensors", weights)
    return tmp_path


def put_tokenizer(folder, content: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(content or tiny_tokenizer().to_str())


def load_bare(host):
    return host.run("LensEncoderLoader", encoder_name="bare.safetensors", feature_cache=False)[0]


@pytest.mark.parametrize(
    "place", ["text_encoders", "text_encoders/gpt-oss-20b", "text_encoders/tokenizer", "lens/Lens/tokenizer"]
)
def test_tokenizer_places(host, tiny, places, place):
    put_tokenizer(places / place)
    assert load_bare(host).tokenize(PROMPT) == tiny.clip.tokenize(PROMPT)


def test_a_missing_tokenizer_names_the_places(host, places):
    (places / "text_encoders" / "other").mkdir()
    put_tokenizer(places / "lens" / "Lens" / "unet")
    with pytest.raises(Exception) as caught:
        load_bare(host)
    message = str(caught.value)
    assert type(caught.value).__name__ == "CheckpointError"
    for word in (
        "bare.safetensors holds no tokenizer",
        "tokenizer.json",
        "text_encoders/other",
        "gpt-oss-20b",
    ):
        assert word in message, message


def test_another_models_tokenizer_is_passed_over(host, tiny, places):
    """Folders of other encoders lie in models/text_encoders too, and come before gpt-oss in the alphabet
    or after it."""
    other = json.loads(tiny_tokenizer().to_str())
    other["added_tokens"] = []
    for folder in ("clip", "qwen"):
        put_tokenizer(places / "text_encoders" / folder, json.dumps(other))
    with pytest.raises(Exception, match="o200k_harmony"):
        load_bare(host)
    put_tokenizer(places / "text_encoders" / "gpt-oss-20b")
    assert load_bare(host).tokenize(PROMPT) == tiny.clip.tokenize(PROMPT)


def test_a_broken_tokenizer_beside_the_file_is_said(host, places):
    put_tokenizer(places / "text_encoders", "{")
    with pytest.raises(Exception, match=r"is not a tokenizer.json .*again") as caught:
        load_bare(host)
    assert type(caught.value).__name__ == "CheckpointError"


def test_a_file_that_went_away_before_the_prompt(host, own_models, tiny_models, encode):
    """Its tensors are read at the first prompt: by then it may be gone, or another. The loader then runs
    again, for its fingerprint is the file's."""
    path = own_models / "text_encoders" / "short_lived.safetensors"
    shutil.copy(tiny_models / "text_encoders" / NAME, path)
    loader = host.node_classes["LensEncoderLoader"]
    before = loader.fingerprint_inputs(encoder_name=path.name)
    assert before and before == loader.fingerprint_inputs(encoder_name=path.name, placement="gpu")
    (clip,) = host.run("LensEncoderLoader", encoder_name=path.name, feature_cache=False)
    path.unlink()
    with pytest.raises(Exception, match=r"short_lived\.safetensors has been changed or removed") as error:
        encode(clip)
    assert type(error.value).__name__ == "CheckpointError"
    assert loader.fingerprint_inputs(encoder_name=path.name) != before
    shutil.copy(tiny_models / "text_encoders" / NAME, path)
    assert loader.fingerprint_inputs(encoder_name=path.name) not in (before, "")
    (clip,) = host.run("LensEncoderLoader", encoder_name=path.name, feature_cache=False)
    assert encode(clip)[0].isfinite().all()
