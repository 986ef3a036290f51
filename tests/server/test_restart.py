"""Features on disk outlive the server: after a restart a prompt seen before loads no encoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.comfy_server import ComfyServer, error_of

ASKED = "Requested to load LensClipModel"
OTHERS = "Requested to load LensModel"
CLEAR = {"clear": {"class_type": "LensClearFeatureCache", "inputs": {}}}


class Restarted:
    """A server that has drawn one picture, was stopped and runs again in the same folder."""

    def __init__(self, folder: Path, models: Path, prompt: dict[str, Any]) -> None:
        self.folder, self.models = folder, models
        self.features = folder / "user" / "__lens" / "features"
        with ComfyServer(folder, models) as first:
            [self.picture] = draw(first, prompt)
            self.first_log = first.log.read_text(errors="replace")
        self.entries = {path.name: path.read_bytes() for path in self.features.iterdir()}
        self.server = ComfyServer(folder, models)

    def log(self) -> str:
        return self.server.log.read_text(errors="replace")


def draw(server: ComfyServer, prompt: dict[str, Any]) -> list[bytes]:
    entry = server.wait(server.queue(prompt))
    assert error_of(entry) is None
    return [path.read_bytes() for path in server.images(entry)]


@pytest.fixture(scope="module")
def restarted(
    tiny_models: Path, tmp_path_factory: pytest.TempPathFactory, picture_prompt: Callable[..., dict[str, Any]]
) -> Iterator[Restarted]:
    base = tmp_path_factory.mktemp("restart")
    shutil.copytree(tiny_models, base / "tiny")
    both = Restarted(base / "comfy", base / "tiny", picture_prompt(text__negative="blue", sampler__cfg=5.0))
    with both.server:
        yield both


def test_after_a_restart_no_encoder_is_loaded(
    restarted: Restarted, picture_prompt: Callable[..., dict[str, Any]]
):
    assert ASKED in restarted.first_log and len(restarted.entries) == 2
    [again] = draw(restarted.server, picture_prompt(text__negative="blue", sampler__cfg=5.0))
    assert again == restarted.picture
    log = restarted.log()
    assert OTHERS in log and ASKED not in log
    draw(restarted.server, picture_prompt(text__prompt="a square"))
    assert ASKED in restarted.log()


def test_clearing_works_again_and_again(restarted: Restarted, picture_prompt: Callable[..., dict[str, Any]]):
    """The same prompt, with nothing changed in it, deletes what has come since."""
    for _ in range(2):
        for name, content in restarted.entries.items():
            (restarted.features / name).write_bytes(content)
        draw(restarted.server, CLEAR)
        assert not list(restarted.features.iterdir())
    before = restarted.log().count(ASKED)
    prompt = picture_prompt(text__negative="blue", sampler__cfg=5.0)
    assert draw(restarted.server, prompt) == [restarted.picture]
    assert restarted.log().count(ASKED) == before + 1


@pytest.mark.parametrize(
    "options",
    [
        {"encoder__placement": "cpu", "encoder__experts": "packed", "encoder__feature_cache": False},
        {"encoder__placement": "stream", "text__extended": True, "text__prompt": "word " * 150},
        {"encoder__placement": "gpu", "text__template_date": "today"},
        {"encoder__encoder_name": "gpt_oss_tiny_nvfp4.safetensors"},
    ],
    ids=str,
)
def test_options_draw(
    restarted: Restarted, picture_prompt: Callable[..., dict[str, Any]], options: dict[str, Any]
):
    assert len(draw(restarted.server, picture_prompt(**options, sampler__seed=8))) == 1


def test_bad_combination_is_one_sentence(restarted: Restarted, picture_prompt: Callable[..., dict[str, Any]]):
    prompt = picture_prompt(encoder__placement="stream", encoder__experts="bfloat16")
    error = error_of(restarted.server.wait(restarted.server.queue(prompt)))
    assert error["node_type"] == "LensEncoderLoader"
    assert "Set LensEncoderLoader's experts to 'packed'." in error["exception_message"]
