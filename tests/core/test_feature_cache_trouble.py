"""The feature cache among files of others, dead writers, full disks and other processes: never fatal."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lens_core.feature_cache import FeatureCache
from tests.core.feature_files import KEY, KEYS, aged, entry, features, names

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


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
