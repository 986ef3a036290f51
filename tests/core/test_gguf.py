"""GGUF files: the tokenizer rebuilt from one, and the sentences for those that cannot be read."""

from __future__ import annotations

import builtins
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from lens_core.errors import CheckpointError, CheckpointMismatch, MissingPackage
from lens_core.loading import load_encoder, open_encoder
from lens_core.prompt import PromptTokenizer
from lens_core.weights.gguf import GgufCheckpoint
from lens_core.weights.gguf_tokenizer import tokenizer_of
from tests import encoder_files as files

# Real merges and specials of o200k_harmony at their real ids; LENS_TOKENIZER names the whole one.
SUBSET = Path(__file__).parents[1] / "fixtures" / "harmony_subset_tokenizer.json"
TOKENIZERS = [SUBSET, *map(Path, filter(None, [os.environ.get("LENS_TOKENIZER")]))]
ADVICE = "Choose gpt-oss-20b as OpenAI publishes it"


@pytest.fixture(scope="module")
def weights(tiny_models: Path) -> dict[str, Tensor]:
    """Hugging Face's MXFP4 tensors of the tiny encoder."""
    tensors = load_file(tiny_models / "text_encoders" / "gpt_oss_tiny_mxfp4.safetensors")
    del tensors["tokenizer_json"]
    return tensors


@pytest.fixture
def path(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    files.write_gguf(tmp_path / "x.gguf", weights)
    return tmp_path / "x.gguf"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_encoder(path)
    return str(caught.value)


def write_tokenizer(path: Path, tokenizer: dict) -> GgufCheckpoint:
    """A GGUF with nothing but a tokenizer, padded by 60 unused rows."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "gpt-oss")
    files.add_tokenizer(writer, tokenizer, 200019 + 60)
    writer.add_tensor("x", np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufCheckpoint(path)


STRINGS = [
    "a red circle of the image",
    "  two  spaces \n\n and\tlines\r\n",
    "I'm sure THEY'LL say it's Don't 12345 1,000.50",
    "Ünï çødé ☃ 图像 изображение 🎨🏽 e\u0301",
    "<|end|><|start|>system<|message|> [PAD200020]",
    "CamelCaseWords andSNAKE_CASE /path/to//file ... ???!!!",
    "",
]


@pytest.mark.parametrize("source", TOKENIZERS, ids=lambda path: path.name)
def test_the_rebuilt_tokenizer_equals_the_original(source: Path, tmp_path: Path):
    content = json.loads(source.read_text(encoding="utf-8"))
    rebuilt = tokenizer_of(write_tokenizer(tmp_path / "x.gguf", content))
    assert rebuilt is not None
    theirs = Tokenizer.from_file(str(source))
    random = torch.randint(32, 0x2FFF, (40, 30)).tolist()
    strings = STRINGS + ["".join(map(chr, codes)) for codes in random]
    for plain in (False, True):
        rebuilt.encode_special_tokens = theirs.encode_special_tokens = plain
        for text in strings:
            want = theirs.encode(text, add_special_tokens=False).ids
            assert rebuilt.encode(text, add_special_tokens=False).ids == want, text
            assert rebuilt.decode(want) == theirs.decode(want)
    ours, original = PromptTokenizer(rebuilt), PromptTokenizer(theirs)
    assert (ours.prefix, ours.suffix) == (original.prefix, original.suffix)
    assert ours("a red fox").ids == original("a red fox").ids
    assert rebuilt.get_vocab_size() == theirs.get_vocab_size()


def test_the_ggufs_own_tokenizer_is_the_last_resort(
    weights: dict[str, Tensor], tiny_folder: Path, tmp_path: Path
):
    beside = tiny_folder / "tokenizer" / "tokenizer.json"
    content = json.loads(beside.read_text(encoding="utf-8"))
    files.write_gguf(tmp_path / "x.gguf", weights, tokenizer=content)
    own = open_encoder(tmp_path / "x.gguf").tokenizer
    assert own.encode("a red circle") == PromptTokenizer.from_json(json.dumps(content)).encode("a red circle")
    assert open_encoder(tmp_path / "x.gguf", [SUBSET]).tokenizer.prefix[0] == 200006, "the given one"


def test_a_gguf_without_a_tokenizer_says_where_to_put_one(path: Path):
    with pytest.raises(CheckpointError, match=r"x\.gguf holds no tokenizer .* Copy gpt-oss-20b's") as caught:
        load_encoder(path, None)
    assert str(caught.value).endswith(f"into {path.parent}.")


def test_a_tokenizer_of_another_kind_is_not_guessed_at(tmp_path: Path):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "gpt-oss")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert tokenizer_of(GgufCheckpoint(tmp_path / "x.gguf")) is None


def test_another_architecture_is_named(weights: dict[str, Tensor], tmp_path: Path):
    files.write_gguf(tmp_path / "x.gguf", weights, architecture="llama")
    message = refusal(tmp_path / "x.gguf")
    assert message.startswith(f"x.gguf is a GGUF of llama; expected a GPT-OSS encoder. {ADVICE}")


def test_a_gguf_without_experts_is_named_so(weights: dict[str, Tensor], tmp_path: Path):
    lacking = {name: tensor for name, tensor in weights.items() if "experts" not in name}
    files.write_gguf(tmp_path / "x.gguf", lacking)
    message = refusal(tmp_path / "x.gguf")
    assert message.startswith(
        f"x.gguf is a GGUF of gpt-oss without experts; expected a GPT-OSS encoder. {ADVICE}"
    )


def test_a_part_of_a_split_gguf_says_how_to_join(tmp_path: Path):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "gpt-oss")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "one of 3 parts of a GGUF (llama-gguf-split --merge joins them)" in refusal(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_experts_of_another_4_bit_type_are_refused_by_name(
    weights: dict[str, Tensor], tmp_path: Path, kind: str
):
    files.write_gguf(tmp_path / "x.gguf", weights, "F16", kind)
    message = refusal(tmp_path / "x.gguf")
    assert f"x.gguf holds its experts as {kind} (blk." in message
    assert "expected MXFP4" in message
    assert "Choose a GGUF of GPT-OSS-20B with MXFP4 experts." in message


def test_a_missing_tensor_is_named(weights: dict[str, Tensor], tmp_path: Path):
    lacking = dict(weights)
    del lacking["model.layers.2.mlp.experts.gate_up_proj_bias"]
    files.write_gguf(tmp_path / "x.gguf", lacking)
    with pytest.raises(CheckpointMismatch) as caught:
        open_encoder(tmp_path / "x.gguf")
    assert caught.value.missing == ["layers.2.mlp.experts.gate.bias", "layers.2.mlp.experts.up.bias"]


def test_a_gguf_cut_in_its_data_is_called_short_with_both_sizes(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[:-50_000])
    message = refusal(path)
    assert f"x.gguf is cut short: {len(content) - 50_000:,} bytes instead of " in message
    assert "Download it again." in message


@pytest.mark.parametrize("length", [4, 7, 20, 60, 500, 3000])
def test_a_gguf_cut_in_its_header_is_called_damaged_with_its_size(path: Path, length: int):
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(path)
    assert message.startswith("x.gguf is cut short or damaged")
    assert f"its {length:,} bytes" in message
    assert "Download it again." in message


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_header_ends_in_a_sentence(path: Path, seed: int):
    """Random bytes in the header: read as something, or refused, but never another error."""
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for at in torch.randint(4, 4000, (12,), generator=generator).tolist():
        content[at] = int(torch.randint(0, 256, (1,), generator=generator))
    path.write_bytes(content)
    assert "x.gguf" in refusal(path)


@pytest.mark.parametrize("version", [1, 4, 0x03000000])
def test_another_version_is_refused(path: Path, version: int):
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
    assert "expected 2 or 3, little-endian" in refusal(path)


def test_an_unknown_tensor_type_asks_for_a_newer_package(path: Path):
    content = path.read_bytes()
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(content[:at] + struct.pack("<I", 250) + content[at + 4 :])
    message = refusal(path)
    assert "x.gguf has a tensor of type 250" in message
    assert "pip install -U gguf" in message


def test_without_the_gguf_package_the_pip_line_is_named(path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def refuse(name: str, *args, **settings):
        if name == "gguf" or name.startswith("gguf."):
            raise ImportError(name)
        return real(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingPackage, match=r"pip install 'gguf>=0\.18'"):
        open_encoder(path)


def test_an_old_gguf_package_is_as_good_as_none(path: Path, monkeypatch: pytest.MonkeyPatch):
    import gguf.constants

    class Old:
        F32 = 0

    monkeypatch.setattr(gguf.constants, "GGMLQuantizationType", Old)
    with pytest.raises(MissingPackage, match=r"gguf package, 0\.18 or newer"):
        open_encoder(path)
