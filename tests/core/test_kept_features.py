"""Features kept by the pipeline, and the command that shows and clears them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lens_core import cli
from lens_core.config import EncoderOptions
from lens_core.errors import SettingError
from lens_core.feature_cache import FeatureCache, feature_key
from lens_core.pipeline import LensPipeline

# Above the tiny tokenizer's 69 tokens.
LONG_PROMPT = "a red circle" + " of the image" * 40


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def filled(folder: Path, entries: int) -> FeatureCache:
    cache = FeatureCache(folder)
    for number in range(entries):
        cache.put(feature_key("tiny", "bf16", (number,), (5,)), torch.ones(1, 250, 1, 1000))
    return cache


def test_cache_shows_and_clears_what_is_kept(cache_home: Path, capsys: pytest.CaptureFixture):
    folder = cache_home / "lens" / "features"
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"0 entries, 0.0 MB in {folder}\n"
    cache = filled(folder, 3)
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"3 entries, 3.0 MB in {folder}\n"
    assert cache.count() == 3
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"3.0 MB freed in {folder}\n"
    assert cache.count() == 0


def test_cache_takes_another_folder(cache_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    at_home, other = filled(cache_home / "lens" / "features", 1), filled(tmp_path / "öther", 1)
    assert cli.main(["cache", "--folder", str(tmp_path / "öther")]) == 0
    assert capsys.readouterr().out == f"1 entry, 1.0 MB in {tmp_path / 'öther'}\n"
    assert cli.main(["cache", "--clear", "--folder", str(tmp_path / "öther")]) == 0
    assert (at_home.count(), other.count()) == (1, 0)


@pytest.mark.parametrize("folder", [__file__, "", "off"])
def test_cache_of_no_folder_is_one_line_and_exit_code_2(folder: str, capsys: pytest.CaptureFixture):
    assert cli.main(["cache", "--folder", folder]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "--folder" in captured.err


def pipeline_with(tiny_folder: Path, identity: str | None = None, **options: Any) -> LensPipeline:
    """A pipeline whose encoder's weights go by another name, if one is given."""
    device = torch.device("cpu")
    pipeline = LensPipeline.from_folder(tiny_folder, device, torch.float32, options=EncoderOptions(**options))
    if identity is not None:
        pipeline.text.file.identity = identity
    return pipeline


def forbid_the_encoder(monkeypatch: pytest.MonkeyPatch, pipeline: LensPipeline) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(pipeline.text.model, "forward", refuse)


def test_a_prompt_seen_before_needs_no_encoder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = pipeline_with(tiny_folder, feature_cache=tmp_path)
    want = first.features("a red circle")
    assert FeatureCache(tmp_path).count() == 1
    second = pipeline_with(tiny_folder, feature_cache=tmp_path)
    forbid_the_encoder(monkeypatch, second)
    assert torch.equal(second.features("a red circle"), want)
    assert not second.text.is_read, "13 GB were read for features that were there"
    with pytest.raises(AssertionError, match="the encoder ran"):
        second.features("a blue circle")


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "another"},
        {"date": "2027-03-09"},
        {"dense": True},
        {"extended": True},
        {"feature_cache": None},
    ],
    ids=str,
)
def test_another_encoder_date_or_extent_is_encoded_again(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
):
    pipeline_with(tiny_folder, feature_cache=tmp_path).features(LONG_PROMPT)
    second = pipeline_with(tiny_folder, **{"feature_cache": tmp_path, **change})
    forbid_the_encoder(monkeypatch, second)
    with pytest.raises(AssertionError, match="the encoder ran"):
        second.features(LONG_PROMPT)


def test_a_malformed_date_reaches_the_caller(tiny_folder: Path):
    with pytest.raises(SettingError, match="YYYY-MM-DD"):
        pipeline_with(tiny_folder, date="23 May").features("a")
