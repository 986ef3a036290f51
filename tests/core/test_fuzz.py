"""20,000 mutated headers and hostile files: each opened, or refused in one sentence, within bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lens_core.errors import CheckpointError
from lens_core.feature_cache import FeatureCache, feature_key
from lens_core.loading import load_vae, open_denoiser, open_encoder
from lens_core.lora.file import open_lora
from lens_core.weights.kind import inspect
from lens_core.weights.reader import open_checkpoint
from tests.fuzz import hostile
from tests.fuzz.bases import safetensors
from tests.fuzz.cases import case
from tests.fuzz.worker import write

ROOT = Path(__file__).parents[2]
CASES = 20_500
# Of resident memory, over all cases. The largest header that is read has 16 MiB, which Python's
# objects for it make a few times as much.
MOST_GROWN_MIB = 500
OPENERS: dict[str, Callable[[Path], object]] = {
    "inspect": inspect,
    "denoiser": open_denoiser,
    "encoder": open_encoder,
    "vae": lambda path: load_vae(path, torch.float32),
    "lora": open_lora,
}


def test_thousands_of_broken_files_are_opened_or_refused_in_a_sentence(tmp_path: Path):
    """``python -m tests.fuzz.worker FOLDER NUMBER 1`` runs one that failed again."""
    command = [sys.executable, "-m", "tests.fuzz.worker", str(tmp_path), "0", str(CASES)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    last = (tmp_path / "number").read_text() if (tmp_path / "number").is_file() else "none"
    assert done.returncode == 0, f"ended in case {last}: {done.returncode}\n{done.stderr[-3000:]}"
    result = json.loads(done.stdout)
    failures = [
        f"case {number}, {case(int(number)).title}:\n{text}" for number, text in result["failures"].items()
    ]
    assert not failures, "\n\n".join(failures)
    assert result["cases"] == CASES
    assert 0 < result["opened"] < CASES / 2, "good files open, and most of these are not good"
    assert result["grown_mib"] < MOST_GROWN_MIB


def test_a_case_is_the_same_each_time(tmp_path: Path):
    assert all(case(number) == case(number) for number in range(1000, 1200))
    assert len({str(case(number).files) for number in range(1000, 1200)}) > 190


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.bin"])
@pytest.mark.parametrize("title", hostile.named())
def test_other_formats_are_named_and_never_opened(
    tmp_path: Path, title: str, name: str, capsys: pytest.CaptureFixture[str]
):
    content, kind = hostile.named()[title]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path / name)
    assert str(caught.value).startswith(f"{name} is {kind}")
    assert "Expected a .safetensors file; choose another file." in str(caught.value)
    assert "unpickled!" not in capsys.readouterr().out


def test_a_header_that_begins_as_a_pickle_does_is_none(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes((640).to_bytes(8, "little") + b'{"a": ' + b" " * 700)
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.fixture(params=OPENERS)
def opener(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return OPENERS[request.param]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, link_to_device])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a folder"])
def test_a_pipe_or_device_is_refused_at_once(
    tmp_path: Path, opener: Callable[[Path], object], make: Callable[[Path], None], inside: bool
):
    make(tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors is a folder, a pipe or a device\. Expected a file"
    ):
        opener(tmp_path if inside else tmp_path / "x.safetensors")


def test_a_pipe_for_an_index_or_a_config_is_not_waited_for(tmp_path: Path):
    make_pipe(tmp_path / "x.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"index\.json is a folder, a pipe or a device"):
        open_checkpoint(tmp_path)


def test_a_folder_called_as_a_file_is_looked_into(tmp_path: Path, opener: Callable[[Path], object]):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(
        CheckpointError, match=r"in .*x\.safetensors; found none\. Download the folder again\."
    ):
        opener(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "missing"])
def test_a_path_that_cannot_be_is_named(tmp_path: Path, opener: Callable[[Path], object], name: str):
    with pytest.raises(CheckpointError, match=r"There is no file|cannot be read \(.*\)\. Check its name"):
        opener(tmp_path / name)


def test_a_file_that_must_not_be_read_is_named(
    tmp_path: Path, opener: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
):
    """Simulated: root may read everything."""
    write(case(0), tmp_path)
    path = tmp_path / "x.safetensors"

    def refuse(self: Path, *_: object, **__: object):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        CheckpointError, match=r"cannot be read \(Permission denied\)\. Check .* who may read it"
    ):
        opener(path)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_file_that_has_become_shorter_is_an_error(tmp_path: Path, dtype: torch.dtype | None):
    file = safetensors()["denoiser"].good()
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.start + bytes(file.size - len(file.start)))
    checkpoint = open_checkpoint(path)
    os.truncate(path, len(file.start) + 8)
    with pytest.raises(CheckpointError, match=r"has been changed or removed since it was opened"):
        checkpoint.read("txt_norm.3.weight", dtype)


def test_links_to_shards_are_followed(tmp_path: Path):
    """As the hub's cache has them: names in a folder, contents elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    file = safetensors()["denoiser"].good()
    (tmp_path / "blobs" / "0a1b").write_bytes(file.start + bytes(file.size - len(file.start)))
    (tmp_path / "snapshot" / "x-00001-of-00001.safetensors").symlink_to("../blobs/0a1b")
    index = {"weight_map": {"img_in.weight": "x-00001-of-00001.safetensors"}}
    (tmp_path / "snapshot" / "x.safetensors.index.json").write_text(json.dumps(index))
    assert "img_in.weight" in open_checkpoint(tmp_path / "snapshot").header


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:\\secret", "\\\\h\\x"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str):
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="lists files outside that folder, where nothing is read"):
        open_checkpoint(tmp_path / "x")


def test_a_folder_of_thousands_of_files_is_refused_by_their_number(tmp_path: Path):
    weight_map = {f"t{index}": f"{index}.safetensors" for index in range(3000)}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="lists 3,000 files; expected at most 1,000"):
        open_checkpoint(tmp_path)


def test_a_folder_of_pickles_says_so(tmp_path: Path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    message = "found none, and diffusion_pytorch_model.bin, which are Python pickles and never opened"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_message_holds_nothing_that_a_terminal_obeys(tmp_path: Path):
    error = CheckpointError("x\x1b[2J\n\ud800\u202e is " + "a" * 100_000 + ". Choose another.")
    assert str(error).isprintable()
    assert str(error).startswith("x\\x1b[2J \\ud800\\u202e is a")
    assert str(error).endswith("a. Choose another.")
    assert len(str(error)) < 5000


def test_no_entry_of_the_feature_cache_is_worse_than_a_miss(tmp_path: Path):
    cache, key = FeatureCache(tmp_path), feature_key("a", "b", [1], [5])
    for number in range(400):
        found = case(10_000 + number)
        content = next(iter(found.files.values())).start
        (tmp_path / f"{key}.safetensors").write_bytes(content)
        assert cache.get(key) is None, found.title
        assert not (tmp_path / f"{key}.safetensors").exists(), "it is deleted"
