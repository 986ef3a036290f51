"""A quantised file that was interrupted goes on to the same bytes; a full disk is a sentence."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from lens_core.denoiser_file import DenoiserFile
from lens_core.errors import CheckpointError, SettingError
from lens_core.loading import open_denoiser
from lens_core.quantize_file import quantize_file
from lens_core.weights.writer import SYNC
from tests.core.quantize_cases import MODE, TENSORS, Cancel, begin, finish, part_of, stop_after

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tiny_folder: Path) -> DenoiserFile:
    return open_denoiser(tiny_folder)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "quantised.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    return quantize_file(open_denoiser(tiny_folder), MODE, out).read_bytes()


def test_cancelled_at_every_tensor_it_goes_on_to_the_same_file(
    source: DenoiserFile, target: Path, whole: bytes
):
    lengths = []
    for count in range(1, TENSORS + 1):
        begin(source, target, count)
        part = part_of(target).read_bytes()
        assert whole.startswith(part)
        lengths.append(len(part))
    assert lengths == sorted(set(lengths)), "each has one tensor more"
    assert finish(source, target) > TENSORS - 2 * SYNC
    assert target.read_bytes() == whole


@pytest.mark.parametrize("count", [1, 7, 8, 9, 47, 93, 94])
def test_cancelled_once_no_more_than_a_few_tensors_are_made_again(
    source: DenoiserFile, target: Path, whole: bytes, count: int
):
    begin(source, target, count)
    assert count - SYNC <= finish(source, target) < count
    assert target.read_bytes() == whole


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 1])
def test_a_part_cut_anywhere_goes_on_to_the_same_file(
    source: DenoiserFile, target: Path, whole: bytes, share: float
):
    """A killed process leaves any length; one that died before the last rename, all."""
    part_of(target).write_bytes(whole[: int(share * len(whole))])
    there = finish(source, target)
    assert (there > 20) == (share >= 0.5)
    assert target.read_bytes() == whole


@pytest.mark.parametrize(("count", "lost"), [(57, 0), (60, 0), (63, 0), (64, 0), (64, 1), (65, 0)])
def test_what_a_power_cut_turned_to_zeros_is_written_anew(
    source: DenoiserFile,
    target: Path,
    whole: bytes,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    lost: int,
):
    """The disk may have a file's length before its data: all after the last sync can be zeros, and where the
    power went during one, all after the sync before."""
    synced = [0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
        begin(source, target, count)
    part = part_of(target)
    content = part.read_bytes()
    safe = synced[-1 - lost]
    part.write_bytes(content[:safe] + bytes(len(content) - safe))
    finish(source, target)
    assert target.read_bytes() == whole


@pytest.mark.parametrize("other", ["mode", "source", "header", "garbage"])
def test_the_part_of_something_else_is_begun_anew(
    source: DenoiserFile, tiny_folder: Path, tmp_path: Path, target: Path, whole: bytes, other: str
):
    if other == "source":
        folder = Path(shutil.copytree(tiny_folder, tmp_path / "again"))
        os.utime(next((folder / "transformer").glob("*00001*")), (1, 1))
        begin(open_denoiser(folder), target, 50)
    elif other == "mode":
        begin(source, target, 50, "int8_weight_only")
    else:
        begin(source, target, 50)
        content = part_of(target).read_bytes()
        at = 100 if other == "header" else 0
        changed = content[:at] + b"!" + content[at + 1 :] if other == "header" else b"x" * 2 * len(whole)
        part_of(target).write_bytes(changed)
    assert finish(source, target) == 0
    assert target.read_bytes() == whole


def test_cancelling_leaves_a_finished_file_alone(source: DenoiserFile, target: Path):
    target.write_bytes(b"mine")
    with pytest.raises(Cancel):
        quantize_file(source, MODE, target, on_tensor=stop_after(20), overwrite=True)
    assert target.read_bytes() == b"mine"
    assert part_of(target).exists()


# Disks


def test_too_little_room_is_said_before_anything_is_written(
    source: DenoiserFile, target: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
):
    room = len(whole) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, room))
    with pytest.raises(SettingError) as caught:
        quantize_file(source, MODE, target)
    for words in ("quantised.safetensors needs 2.7 MB", "2.7 MB are free in", "choose another folder"):
        assert words in str(caught.value)
    assert list(target.parent.iterdir()) == []
    room += 1
    finish(source, target)


def test_what_is_written_counts_as_room(
    source: DenoiserFile, target: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
):
    begin(source, target, 60)
    free = len(whole) - part_of(target).stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    assert finish(source, target) >= 48


class Full:
    """A file on a disk that has room for so many bytes, and takes less than it is given before it is full."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self.file.write(data[: min(self.room, 100_000)])
        self.room -= count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_disk_that_fills_up_is_one_sentence_and_it_goes_on(
    source: DenoiserFile, target: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
):
    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "open",
            lambda path, mode="r", **rest: (
                Full(real(path, mode, **rest), 1_500_000) if "a" in mode else real(path, mode, **rest)
            ),
        )
        with pytest.raises(CheckpointError) as caught:
            quantize_file(source, MODE, target)
    for words in (f"disk of {target.parent} is full", "takes 2.7 MB", "goes on where it stopped"):
        assert words in str(caught.value)
    assert part_of(target).stat().st_size == 1_500_000
    assert finish(source, target) > 20
    assert target.read_bytes() == whole


def test_a_folder_that_refuses_is_one_sentence(
    source: DenoiserFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(
        CheckpointError, match=r"taken.x\.safetensors cannot be written \(.+\)\. Give a folder"
    ):
        quantize_file(source, MODE, tmp_path / "taken" / "x.safetensors")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    target = tmp_path / "in_use.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(CheckpointError, match=r"\(Permission denied\).*have the file open"):
            quantize_file(source, MODE, target)
    assert finish(source, target) > 80, "only its name was lacking"


def test_folders_on_the_way_are_made(source: DenoiserFile, tmp_path: Path):
    finish(source, tmp_path / "new" / "folder" / "x.safetensors")


def test_two_at_once_do_not_mix(source: DenoiserFile, target: Path, whole: bytes):
    """The second is told of the first, which goes on undisturbed."""

    def second(done: int, _: int) -> None:
        if done == 20:
            with pytest.raises(CheckpointError, match="being written by another program"):
                quantize_file(source, MODE, target)

    quantize_file(source, MODE, target, on_tensor=second)
    assert target.read_bytes() == whole
