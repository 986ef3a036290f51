"""Downloads from a hub on this machine: in place whole and right, or not at all, with a reason."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from huggingface_hub import file_download

from lens_core import cli, download, hub, sources
from lens_core.download import Downloads, sources_of
from lens_core.errors import MissingPackage
from lens_core.hub import DownloadError
from tests.core.hub_server import Hub, serve

COMFY, SCENE = "Comfy-Org/Lens", "SceneWorks/Lens"
VAE, PLACE = bytes(range(256)) * 4096, "vae/flux2-vae.safetensors"
SHARD, INDEX = b"shard" * 5000, b'{"weight_map": {}}'
FOLDER = {
    "transformer/a-00001-of-00001.safetensors": SHARD,
    "transformer/a.safetensors.index.json": INDEX,
    "transformer/pickle.bin": b"no",
    "README.md": b"no",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub with the VAE in both repositories and Lens-Base in a folder, and a table that says so."""
    published = sources.Published(len(VAE), hashlib.sha256(VAE).hexdigest())
    monkeypatch.setitem(sources.PUBLISHED, PLACE, published)
    # A transfer that broke off is tried again after a second, which no test waits for.
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    # What a read of this size lacks is lost when it breaks off; the real one is 10 MB.
    monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    files = {
        COMFY: {PLACE: VAE},
        SCENE: {"vae/diffusion_pytorch_model.safetensors": VAE},
        "YuCollection/Lens-Base-Diffusers": dict(FOLDER),
    }
    with serve(Hub(files)) as running:
        yield running


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def fetch(server: Hub, models: Path, *names: str, **options: bool) -> list[str]:
    """Download and return the new files' places, with / on every system."""
    downloads = Downloads(models, endpoint=server.url, **options)
    wanted = downloads.plan(sources_of(names or ["vae"]))
    downloads.check_room(wanted)
    return [path.relative_to(models).as_posix() for one in wanted for path in downloads.fetch(one)]


def files_in(models: Path) -> dict[str, bytes]:
    """Every file below the models folder, staged ones too."""
    paths = (path for path in models.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(models).as_posix(): path.read_bytes() for path in paths}


def test_a_file_comes_to_its_place_and_nothing_else_stays(server: Hub, models: Path):
    assert fetch(server, models) == [PLACE]
    assert files_in(models) == {PLACE: VAE}
    assert not (models / ".lens-download").exists()


def test_a_folder_comes_without_pickles(server: Hub, models: Path):
    assert fetch(server, models, "lens-base-denoiser") == [
        "lens/Lens-Base/transformer/a-00001-of-00001.safetensors",
        "lens/Lens-Base/transformer/a.safetensors.index.json",
    ]
    assert list(files_in(models).values()) == [SHARD, INDEX]


def test_a_folder_stands_in_its_place_only_when_it_is_whole(server: Hub, models: Path):
    server.cuts = [10] * 100
    with pytest.raises(DownloadError):
        fetch(server, models, "lens-base-denoiser")
    assert not (models / "lens").exists()


def test_what_a_mirror_left_unfinished_does_not_mix_with_the_next_one(server: Hub, models: Path):
    """Two mirrors of a folder may be cut into shards differently."""
    first, second = "YuCollection/Lens-Base-Diffusers", "Jinstudio/Lens-Base"
    server.files[first] = {"transformer/1.safetensors": SHARD, "transformer/old/2.safetensors": VAE}
    server.files[second] = {"transformer/whole.safetensors": VAE[::-1]}
    server.cuts = [len(SHARD), *[5000] * 1, *[0] * 6]
    assert fetch(server, models, "lens-base-denoiser") == ["lens/Lens-Base/transformer/whole.safetensors"]
    assert files_in(models) == {"lens/Lens-Base/transformer/whole.safetensors": VAE[::-1]}
    assert len(list((models / "lens").rglob("*"))) == 3, "no empty folders either"


def test_files_missing_in_a_folder_join_those_that_are_there(server: Hub, models: Path):
    fetch(server, models, "lens-base-denoiser")
    (models / "lens/Lens-Base/transformer/a.safetensors.index.json").unlink()
    (models / "lens/Lens-Base/own.txt").write_text("mine")
    server.requests.clear()
    assert fetch(server, models, "lens-base-denoiser") == [
        "lens/Lens-Base/transformer/a.safetensors.index.json"
    ]
    assert [name for name, _ in server.transfers()] == ["transformer/a.safetensors.index.json"]
    assert (models / "lens/Lens-Base/own.txt").read_text() == "mine"


def test_a_cut_connection_is_taken_up_where_it_broke(server: Hub, models: Path):
    server.cuts = [300_000]
    assert fetch(server, models) == [PLACE]
    assert [part for _, part in server.transfers()] == [None, "bytes=300000-"]
    assert files_in(models) == {PLACE: VAE}


def test_a_cancelled_download_goes_on_in_the_next_run(server: Hub, models: Path, monkeypatch):
    server.cuts = [300_000]

    def cancel(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(file_download, "time", SimpleNamespace(sleep=cancel))
        fetch(server, models)
    assert list(files_in(models).values()) == [VAE[:300_000]]
    assert not (models / "vae").exists()
    # Another mirror of the same bytes serves as well.
    server.refused[COMFY] = 404
    assert fetch(server, models) == [PLACE]
    assert server.transfers()[-1][1] == "bytes=300000-"
    assert files_in(models) == {PLACE: VAE}


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"refused": {COMFY: 404}}, "(404)"),
        ({"refused": {COMFY: 401}}, "(401)"),
        ({"slow": {COMFY: 0.5}}, "no answer"),
    ],
    ids=["404", "401", "timeout"],
)
def test_the_next_mirror_serves_where_the_first_does_not(server, models, monkeypatch, caplog, trouble, said):
    monkeypatch.setattr(hub, "_TIMEOUT", 0.2)
    for name, value in trouble.items():
        getattr(server, name).update(value)
    assert fetch(server, models) == [PLACE]
    assert files_in(models) == {PLACE: VAE}
    (line,) = caplog.messages
    assert line.startswith(COMFY) and said in line and line.endswith(f"Trying {SCENE}.")


def test_a_mirror_that_breaks_while_sending_is_followed_by_the_next(server: Hub, models: Path, caplog):
    server.cuts = [0] * 6
    assert fetch(server, models) == [PLACE]
    assert any(message.startswith(COMFY) and SCENE in message for message in caplog.messages)


def test_when_no_mirror_serves_every_reason_is_said(server: Hub, models: Path):
    server.refused.update({COMFY: 404, SCENE: 503})
    with pytest.raises(DownloadError) as caught:
        fetch(server, models)
    message = str(caught.value)
    assert all(word in message for word in ("FLUX.2's VAE", f"{COMFY}: ", "(404)", f"{SCENE}: ", "503"))
    assert files_in(models) == {}


def test_other_bytes_than_published_never_arrive(server: Hub, models: Path):
    """The listing claims the published hash, and the file has the size, but not the bytes."""
    server.claimed = dict.fromkeys((COMFY, SCENE), hashlib.sha256(VAE).hexdigest())
    wrong = VAE[:-1] + b"\0"
    server.files[COMFY][PLACE] = wrong
    server.files[SCENE]["vae/diffusion_pytorch_model.safetensors"] = wrong
    with pytest.raises(DownloadError) as caught:
        fetch(server, models)
    assert hashlib.sha256(VAE).hexdigest() in str(caught.value)
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    assert files_in(models) == {}


@pytest.mark.parametrize("content", [VAE[:-1] + b"\0", VAE[:-1]], ids=["another hash", "another size"])
def test_a_mirror_that_offers_another_file_is_not_asked_for_it(server: Hub, models: Path, caplog, content):
    server.files[COMFY][PLACE] = content
    assert fetch(server, models) == [PLACE]
    assert files_in(models) == {PLACE: VAE}
    assert "the published one" in caplog.text and len(server.transfers()) == 1


@pytest.mark.parametrize(
    "name", ["transformer/../../../escape.json", "transformer/..\\escape.json", "transformer/C:escape.json"]
)
def test_names_of_a_listing_do_not_leave_the_folder(server: Hub, models: Path, name):
    server.files["YuCollection/Lens-Base-Diffusers"][name] = b"{}"
    with pytest.raises(DownloadError, match="unusable name"):
        fetch(server, models, "lens-base-denoiser")
    assert files_in(models.parent) == {}


def test_no_room_is_said_before_anything_comes(server: Hub, models: Path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(VAE) - 1))
    with pytest.raises(DownloadError, match=r"0\.00 GB are to come, but the disk of .*models has"):
        fetch(server, models)
    assert server.transfers() == []


def test_what_is_staged_already_needs_no_room(server: Hub, models: Path, monkeypatch):
    server.cuts = [len(VAE) - 1000] + [0] * 20
    with pytest.raises(DownloadError):
        fetch(server, models)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2000))
    server.cuts = []
    assert fetch(server, models) == [PLACE]


def test_a_full_disk_is_no_reason_to_try_other_mirrors(server: Hub, models: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        fetch(server, models)
    assert [path for path, _ in server.requests] == [f"/api/models/{COMFY}"]


def test_what_is_there_is_left_alone_without_asking(server: Hub, models: Path, caplog):
    (models / "vae").mkdir()
    (models / PLACE).write_bytes(VAE[::-1])  # the size alone counts
    caplog.set_level("INFO")
    assert fetch(server, models) == []
    assert server.requests == [] and "is there already" in caplog.text


def test_verify_finds_a_damaged_file_and_overwrite_replaces_it(server: Hub, models: Path):
    (models / "vae").mkdir()
    (models / PLACE).write_bytes(VAE[::-1])
    with pytest.raises(DownloadError, match=hashlib.sha256(VAE[::-1]).hexdigest()):
        fetch(server, models, verify=True)
    assert fetch(server, models, verify=True, overwrite=True) == [PLACE]
    assert fetch(server, models, verify=True) == []


def test_another_file_of_that_name_is_not_replaced_unasked(server: Hub, models: Path):
    (models / "vae").mkdir()
    (models / PLACE).write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"4 bytes.*--overwrite"):
        fetch(server, models)
    assert files_in(models) == {PLACE: b"mine"}


def test_two_downloads_at_once_do_not_mix(server: Hub, models: Path):
    (models / ".lens-download").mkdir()
    with FileLock(models / ".lens-download" / "lock"), pytest.raises(DownloadError, match="under way"):
        fetch(server, models)


def test_the_command_prints_what_comes_and_where_to(server: Hub, models: Path):
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    program = (
        "import argparse, sys; from lens_core.cli_download import add_download, download; "
        "parser = argparse.ArgumentParser(); add_download(parser.add_subparsers()); "
        "[print(line) for line in download(parser.parse_args(sys.argv[1:]))]"
    )
    command = [sys.executable, "-c", program, "download", "lens-base-denoiser", "--to", str(models)]
    environment = {**os.environ, "HF_ENDPOINT": server.url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    place = models / "lens/Lens-Base/transformer/a-00001-of-00001.safetensors"
    first, _, room, *new = done.stdout.splitlines()
    source = "YuCollection/Lens-Base-Diffusers/transformer/a-00001-of-00001.safetensors"
    assert first == f"    0.00 GB  {source} -> {place}"
    assert "0.00 GB to fetch" in room and f"GB free in {models}" in room
    assert new[0] == str(place) and place.read_bytes() == SHARD


def test_list_names_everything_with_its_size(capsys):
    assert cli.main(["download", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sources.BUNDLES)
    assert lines[0].split()[:3] == ["21.75", "GB", "lens-turbo"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lens-ultra", "--to", "."], "no lens-ultra to download. Expected: lens-turbo, lens, "),
        (["vae"], "where to"),
        (["--to", "."], "what to fetch"),
        (["vae", "--to", "nowhere"], "nowhere is no folder"),
    ],
)
def test_wrong_use_is_one_line(capsys, arguments, said):
    assert cli.main(["download", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_huggingface_hub_the_pip_line_is_said(models: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match="pip install huggingface_hub"):
        Downloads(models).plan(sources_of(["vae"]))


def test_ctrl_c_says_that_the_same_command_goes_on(server: Hub, models: Path, monkeypatch, capsys, caplog):
    def cancel(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "offer_of", lambda mirror, _: hub.offer_of(mirror, server.url))
    monkeypatch.setattr(download, "get", cancel)
    caplog.set_level("INFO")
    assert cli.main(["download", "vae", "--to", str(models)]) == 130
    assert "cancelled" in capsys.readouterr().err and "the same command goes on" in caplog.text
