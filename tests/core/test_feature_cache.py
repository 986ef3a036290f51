"""The feature cache on disk: keys, what comes back, damaged entries, and the limit."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from lens_core.errors import SettingError
from lens_core.feature_cache import FeatureCache, feature_key
from tests.core.feature_files import IDS, KEY, KEYS, LAYERS, aged, entry, features, names


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


# Keys


def test_a_key_stays_the_same_from_version_to_version():
    # Whoever changes this loses every cache: raise VERSION on purpose, not by accident.
    key = feature_key("gpt-oss-20b", "bf16", IDS, LAYERS)
    assert key == "6f19801d61958bdcedec6d93ffc40bf75026635395296bd8c80ef9df05a694a9"


@pytest.mark.parametrize(
    "other",
    [
        ("other", "bf16", IDS, LAYERS),
        ("gpt-oss-20b", "fp32", IDS, LAYERS),
        ("gpt-oss-20b", "bf16", IDS[:-1], LAYERS),
        ("gpt-oss-20b", "bf16", (*IDS, 5), LAYERS[1:]),
        ("gpt-oss-20b", "bf16", IDS[::-1], LAYERS),
        ("gpt-oss-20b", "bf16", IDS, LAYERS[:-1]),
        ("gpt-oss-20b,bf16", "", IDS, LAYERS),
        ('gpt-oss-20b","bf16', "", IDS, LAYERS),
        ("gpt-oss-20b", "bf16", (), (*IDS, *LAYERS)),
    ],
)
def test_a_key_differs_in_every_part(other: tuple):
    assert feature_key(*other) != feature_key("gpt-oss-20b", "bf16", IDS, LAYERS)


def test_a_key_does_not_depend_on_the_kind_of_sequence_or_number():
    want = feature_key("ünï\ud800", "bf16", IDS, LAYERS)
    assert want == feature_key("ünï\ud800", "bf16", list(IDS), torch.tensor(LAYERS))


@pytest.mark.parametrize(
    "key", ["", "../" * 20 + "etc", "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 64 + "/x"]
)
def test_another_key_is_refused(cache: FeatureCache, key: str):
    with pytest.raises(SettingError, match="64 hex digits"):
        cache.get(key)
    with pytest.raises(SettingError, match="64 hex digits"):
        cache.put(key, features())
    assert not cache.folder.exists()


# What comes back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 415])
def test_what_was_put_comes_back_in_another_object(cache: FeatureCache, tokens: int, dtype: torch.dtype):
    want = features(1, tokens, dtype)
    cache.put(KEY, want)
    got = FeatureCache(cache.folder).get(KEY)
    assert got is not None
    assert got.dtype == dtype
    assert got.device.type == "cpu"
    assert torch.equal(got, want)
    assert names(cache) == {f"{KEY}.safetensors"}


def test_a_part_of_a_larger_tensor_is_kept_alone(cache: FeatureCache):
    whole = features(tokens=40)
    cache.put(KEY, whole[:, 33:])
    cache.put(KEYS[1], whole[:, ::2])
    assert torch.equal(cache.get(KEY), whole[:, 33:])
    assert torch.equal(cache.get(KEYS[1]), whole[:, ::2])
    assert entry(cache).stat().st_size < whole.nbytes / 2


def test_every_bit_pattern_of_a_finite_number_survives(cache: FeatureCache):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    finite = bits[torch.isfinite(bits)].reshape(1, -1, 4, 2)
    cache.put(KEY, finite)
    assert torch.equal(cache.get(KEY).view(torch.int16), finite.view(torch.int16))


def test_what_was_never_put_is_a_miss(cache: FeatureCache):
    assert cache.get(KEY) is None
    cache.put(KEY, features())
    assert cache.get(KEYS[1]) is None


def test_a_second_put_replaces_the_first(cache: FeatureCache):
    cache.put(KEY, features(1))
    cache.put(KEY, features(2))
    assert torch.equal(cache.get(KEY), features(2))
    assert cache.count() == 1


def test_the_returned_tensor_is_free_of_the_file(cache: FeatureCache):
    cache.put(KEY, features(1))
    got = cache.get(KEY)
    with entry(cache).open("r+b") as file:  # a mapping would show these zeros
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(bytes(size))
    assert torch.equal(got, features(1))
    got[0] = 0  # and it is writable


def test_an_entry_says_what_it_is_and_not_what_was_typed(cache: FeatureCache):
    cache.put(KEY, features(tokens=9, dtype=torch.float32))
    with safe_open(entry(cache), framework="pt") as file:
        metadata = file.metadata()
        assert list(file.keys()) == ["features"]
        assert file.get_slice("features").get_shape() == [1, 9, 4, 24]
    assert metadata.pop("crc32").isdigit()
    assert metadata == {
        "format": "lens text features",
        "version": "1",
        "precision": "fp32",
        "tokens": "9",
    }


@pytest.mark.parametrize(
    "name", ["ünïcødé", "日本語", "a b 'c' \"d\"", "🏠", "e\u0301", "%41 #x;"], ids=ascii
)
def test_any_folder_name_will_do(tmp_path: Path, name: str):
    cache = FeatureCache(tmp_path / name / "deeper" / "features")
    cache.put(KEY, features(3))
    assert torch.equal(cache.get(KEY), features(3))
    assert cache.size() == cache.clear() > 0


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 7, 4, 24),
        torch.zeros(7, 4, 24),
        torch.zeros(1, 7, 96),
        torch.zeros(1, 7, 4, 24, dtype=torch.float16),
        torch.zeros(1, 7, 4, 24, dtype=torch.int64),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_other_tensors_are_refused_with_their_shape(cache: FeatureCache, wrong: Tensor):
    with pytest.raises(SettingError, match=r"\[1, S, L, H\] in bf16 or fp32, got \[.*\] in torch\."):
        cache.put(KEY, wrong)
    assert cache.get(KEY) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_no_numbers_are_not_kept(
    cache: FeatureCache, bad: float, caplog: pytest.LogCaptureFixture
):
    spoiled = features()
    spoiled[0, 3, 2, 5] = bad
    cache.put(KEY, spoiled)
    assert cache.get(KEY) is None
    assert "not kept" in caplog.text


# Damage


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    tensors = {"features": features(1)}
    middle = len(data) - 100
    spoiled = {
        "empty": b"",
        "seven bytes": data[:7],
        "half": data[: len(data) // 2],
        "one byte short": data[:-1],
        "one byte more": data + b"\0",
        "one bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "zeros at the end": data[:-300] + bytes(300),
        "all zeros": bytes(len(data)),
        "no safetensors": b"<!DOCTYPE html>" * 99,
        "length beyond everything": b"\xff" * 8 + data[8:],
        "a header that is a list": (8).to_bytes(8, "little") + b"[1, 2 ] ",
        "a header that is a number": (8).to_bytes(8, "little") + b"1       ",
        "metadata that is a list": (24).to_bytes(8, "little") + b'{"__metadata__": [1, 2]}',
        "no metadata": save(tensors),
        "no checksum": save(tensors, {"version": "1"}),
        "a checksum that is a word": save(tensors, {"crc32": "many"}),
        "another checksum": save(tensors, {"crc32": "1"}),
    }
    path.write_bytes(spoiled[kind])


DAMAGES = """empty|seven bytes|half|one byte short|one byte more|one bit|zeros at the end|all zeros
no safetensors|length beyond everything|a header that is a list|a header that is a number
metadata that is a list|no metadata|no checksum|a checksum that is a word|another checksum"""


@pytest.mark.parametrize("kind", DAMAGES.replace("\n", "|").split("|"))
def test_a_damaged_entry_is_a_miss_and_deleted(
    cache: FeatureCache, kind: str, caplog: pytest.LogCaptureFixture
):
    cache.put(KEY, features(1))
    cache.put(KEYS[1], features(2))
    damage(entry(cache), kind)
    assert cache.get(KEY) is None
    assert "damaged" in caplog.text
    assert names(cache) == {f"{KEYS[1]}.safetensors"}
    cache.put(KEY, features(1))
    assert torch.equal(cache.get(KEY), features(1))


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(1, 7, 4, 24)},
        {"features": torch.zeros(2, 7, 4, 24)},
        {"features": torch.zeros(1, 7, 4, 24, dtype=torch.float64)},
    ],
    ids=["name", "shape", "dtype"],
)
def test_a_whole_file_with_something_else_in_it_is_a_miss(cache: FeatureCache, tensors: dict[str, Tensor]):
    cache.folder.mkdir()
    (tensor,) = tensors.values()
    save_file(tensors, entry(cache), {"crc32": str(zlib.crc32(tensor.numpy().tobytes()))})
    assert cache.get(KEY) is None
    assert names(cache) == set()


# The limit


def test_the_entries_used_longest_ago_make_room(cache: FeatureCache):
    cache.put(KEY, features())
    cache.max_bytes = int(cache.size() * 3.5)
    for number, key in enumerate(KEYS[1:3], start=1):
        cache.put(key, features(number))
    for seconds, key in ((300, KEYS[0]), (200, KEYS[1]), (100, KEYS[2])):
        aged(cache, key, seconds)
    assert cache.get(KEYS[0]) is not None  # now the youngest
    cache.put(KEYS[3], features(3))
    assert names(cache) == {f"{key}.safetensors" for key in (KEYS[0], KEYS[2], KEYS[3])}
    for seconds, key in ((100, KEYS[0]), (300, KEYS[2]), (200, KEYS[3])):
        aged(cache, key, seconds)
    cache.put(KEYS[4], features(4, tokens=14))  # as large as two
    assert names(cache) == {f"{key}.safetensors" for key in (KEYS[0], KEYS[4])}
    assert torch.equal(cache.get(KEYS[4]), features(4, tokens=14))


def test_the_new_entry_stays_though_others_come_from_the_future(cache: FeatureCache):
    cache.put(KEY, features())
    cache.max_bytes = int(cache.size() * 1.5)
    aged(cache, KEY, -86400)
    cache.put(KEYS[1], features(1))
    assert names(cache) == {f"{KEYS[1]}.safetensors"}


def test_exactly_full_is_not_too_full(cache: FeatureCache):
    cache.put(KEY, features())
    cache.max_bytes = 2 * cache.size()
    cache.put(KEYS[1], features(1))
    assert cache.size() == cache.max_bytes
    cache.max_bytes -= 1
    aged(cache, KEY, 100)
    cache.put(KEYS[1], features(1))
    assert names(cache) == {f"{KEYS[1]}.safetensors"}


def test_an_entry_above_the_limit_is_not_kept_and_drives_none_out(cache: FeatureCache):
    cache.put(KEY, features())
    cache.max_bytes = cache.size()
    cache.put(KEYS[1], features(1, tokens=70))
    assert names(cache) == {f"{KEY}.safetensors"}


def test_the_default_limit_is_a_gigabyte(tmp_path: Path):
    assert FeatureCache(tmp_path).max_bytes == 2**30
