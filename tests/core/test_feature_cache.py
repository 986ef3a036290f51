"""The feature cache on disk: what comes back, what is deleted, and that nothing wrong with it is fatal."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from lens_core.errors import SettingError
from lens_core.feature_cache import FeatureCache, feature_key

REPOSITORY = Path(__file__).parents[2]
IDS = (200006, 17360, 200008, 64, 3592, 68347)
LAYERS = (5, 11, 17, 23)
KEYS = [feature_key("weights", "bf16", (number,), LAYERS) for number in range(12)]
KEY = KEYS[0]


def features(seed: int = 0, tokens: int = 7, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, 4, 24, generator=generator).to(dtype)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def entry(cache: FeatureCache, key: str = KEY) -> Path:
    return cache.folder / f"{key}.safetensors"


def names(cache: FeatureCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()}


def aged(cache: FeatureCache, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(entry(cache, key), (then, then))


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


# Files of others, and of writers that died


def foreign_files(folder: Path) -> set[str]:
    folder.mkdir(exist_ok=True)
    others = {
        *("notes.txt", "model.safetensors", f"{KEY[:-1]}.safetensors", f"{KEY.upper()}x.safetensors"),
        *(f"{KEYS[2]}.safetensors.bak", f"x{KEYS[2]}.safetensors", f"{KEYS[2]}.part", f"{KEYS[2]}.tmp"),
    }
    for name in others:
        (folder / name).write_bytes(b"mine" * 1000)
        os.utime(folder / name, (1, 1))
    (folder / f"{KEYS[3]}.safetensors").mkdir()
    (folder / f"{KEYS[4]}.safetensors").symlink_to(folder / "notes.txt")
    return {*others, f"{KEYS[3]}.safetensors", f"{KEYS[4]}.safetensors"}


def test_files_of_others_are_neither_counted_nor_deleted(cache: FeatureCache):
    others = foreign_files(cache.folder)
    assert (cache.size(), cache.count(), cache.clear()) == (0, 0, 0)
    cache.put(KEY, features())
    size = entry(cache).stat().st_size
    assert (cache.size(), cache.count()) == (size, 1)
    cache.max_bytes = size
    cache.put(KEYS[1], features(1))
    assert names(cache) == others | {f"{KEYS[1]}.safetensors"}
    assert cache.clear() == size
    assert names(cache) == others
    assert (cache.folder / "notes.txt").read_bytes() == b"mine" * 1000


def test_clear_says_what_it_freed(cache: FeatureCache):
    assert cache.clear() == 0
    for number, key in enumerate(KEYS[:3]):
        cache.put(key, features(number))
    assert cache.count() == 3
    size = cache.size()
    assert size == sum(path.stat().st_size for path in cache.folder.iterdir())
    assert cache.clear() == size
    assert (cache.size(), cache.count(), names(cache)) == (0, 0, set())


def test_what_a_killed_writer_left_goes_after_an_hour(cache: FeatureCache):
    cache.put(KEY, features())
    fresh, stale = (cache.folder / f"{KEYS[2]}.{digit * 16}.part" for digit in "ab")
    for path in (fresh, stale):
        path.write_bytes(b"half an entry")
    os.utime(fresh, (time.time() - 3500,) * 2)
    os.utime(stale, (time.time() - 3700,) * 2)
    assert cache.get(KEYS[2]) is None
    assert cache.count() == 1
    cache.put(KEYS[1], features(1))
    assert names(cache) == {f"{KEY}.safetensors", f"{KEYS[1]}.safetensors", fresh.name}
    os.utime(fresh, (1, 1))
    size = cache.size()
    assert cache.clear() == size + len(b"half an entry")
    assert names(cache) == set()


KILLED = """
import os, sys, torch
from pathlib import Path
from lens_core import feature_cache
Path.replace = lambda *_: os._exit(9)
feature_cache.FeatureCache(Path(sys.argv[1])).put(sys.argv[2], torch.zeros(1, 7, 4, 24))
"""


def test_a_process_killed_while_it_writes_leaves_no_entry(cache: FeatureCache):
    command = [sys.executable, "-c", KILLED, str(cache.folder), KEY]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == 9
    (part,) = cache.folder.iterdir()
    assert part.name.endswith(".part")
    assert cache.get(KEY) is None
    assert (cache.size(), cache.count()) == (0, 0)
    cache.put(KEY, features())
    assert torch.equal(cache.get(KEY), features())
    os.utime(part, (1, 1))
    cache.put(KEYS[1], features())
    assert not part.exists()


def test_an_interrupted_write_leaves_nothing(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, features())
    assert names(cache) == set()


# Folders that cannot be used


def test_a_full_disk_is_one_warning_and_leaves_nothing(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cache.put(KEY, features())
    real = Path.open

    class Full:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = real(path, mode)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            self.file.write(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode="r", **_: Full(path, mode) if mode == "xb" else None)
        for key in KEYS[1:4]:
            cache.put(key, features(1))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("No space left on device", str(cache.folder), "encoded again", "choose another folder"):
        assert part in record.getMessage()
    assert names(cache) == {f"{KEY}.safetensors"}
    assert torch.equal(cache.get(KEY), features())
    cache.put(KEYS[1], features(1))  # there is room again
    assert torch.equal(cache.get(KEYS[1]), features(1))


def test_a_read_only_folder_is_read_and_warned_of_once(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    cache.put(KEY, features())
    real = Path.open
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **kw: refuse() if mode == "xb" else real(path, mode, **kw)
    )
    for key in KEYS[1:4]:
        cache.put(key, features(1))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Permission denied" in caplog.text
    assert torch.equal(cache.get(KEY), features())
    assert cache.clear() == 0
    assert cache.count() == 1


def test_a_file_in_the_folders_place_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "taken").write_text("a file")
    cache = FeatureCache(tmp_path / "taken")
    for key in KEYS[:3]:
        cache.put(key, features())
        assert cache.get(key) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (cache.size(), cache.count(), cache.clear()) == (0, 0, 0)
    assert (tmp_path / "taken").read_text() == "a file"


def test_an_entry_that_cannot_be_read_is_a_miss_and_stays(cache: FeatureCache):
    cache.folder.mkdir()
    entry(cache).mkdir()
    assert cache.get(KEY) is None
    assert entry(cache).is_dir()


# Two at once


def test_entries_that_vanish_while_they_are_listed_are_no_error(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
):
    cache.put(KEY, features())
    listed = [*(f"{key}.safetensors" for key in KEYS), f"{KEY}.{'a' * 16}.part"]
    monkeypatch.setattr(os, "listdir", lambda _: listed)
    size = entry(cache).stat().st_size
    assert (cache.size(), cache.count()) == (size, 1)
    cache.max_bytes = size
    cache.put(KEYS[1], features(1))
    assert cache.clear() == size


def test_an_entry_deleted_between_listing_and_deleting_counts_as_gone(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
):
    for number, key in enumerate(KEYS[:3]):
        cache.put(key, features(number))
        aged(cache, key, 100 - number)
    real = Path.unlink

    def first_by_another(path: Path, missing_ok: bool = False) -> None:
        path.exists() and real(path)
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", first_by_another)
    cache.max_bytes = int(cache.size() * 2.5 / 3)
    cache.put(KEYS[2], features(2))
    assert names(cache) == {f"{key}.safetensors" for key in KEYS[1:3]}


WORKER = """
import random, sys
import torch
from pathlib import Path
from lens_core.feature_cache import FeatureCache, feature_key
torch.set_num_threads(1)
source = random.Random(int(sys.argv[2]))
cache = FeatureCache(Path(sys.argv[1]), 40_000)
hits = 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(1500):
    number = source.randrange(8)
    key = feature_key("weights", "fp32", (number,), (5,))
    got = cache.get(key)
    if got is None:
        cache.put(key, torch.full((1, 10 + number, 4, 64), float(number)))
    else:
        hits += 1
        assert got.shape == (1, 10 + number, 4, 64) and (got == number).all()
    if source.random() < 0.01:
        cache.clear()
print(hits)
"""


def test_processes_share_a_folder(cache: FeatureCache):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(cache.folder), str(seed)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:  # all at once
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert (worker.returncode, err) == (0, "")
        assert int(out) > 100
    assert cache.size() <= 40_000
    assert not [name for name in names(cache) if name.endswith(".part")]
