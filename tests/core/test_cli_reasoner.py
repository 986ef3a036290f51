"""``generate --reasoner api``: the prompt that is drawn, the PNG's settings, failures, and the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_core import cli
from lens_core.images import read_settings
from tests.api_server import ApiServer, refusal, serving
from tests.core.cli_pictures import SETTINGS, SMALL, Generate, pixels

KEY = "sk-very-secret-0123456789"
ONE_STEP = (*SMALL, "--height", 32, "--width", 32, "--steps", 1, "--seed", 7)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("MY_KEY", KEY)


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with serving() as server:
        yield server


def flags(api: ApiServer, *more: object) -> tuple:
    return ("--reasoner", "api", "--api_url", api.url, "--api_model", "m", "--api_key_env", "MY_KEY", *more)


def test_each_prompt_is_rewritten_and_drawn(generate: Generate, api: ApiServer):
    api.reply = lambda body: f"{body['messages'][1]['content']} in snow"
    first, second = generate(*ONE_STEP, *flags(api, "--reasoner_preset", "photo"), "--prompt", "a fox|a cat")
    settings = read_settings(second)
    assert settings["prompt"] == "a cat in snow"
    assert {name: settings[name] for name in settings.keys() - SETTINGS} == {
        "original_prompt": "a cat",
        "reasoner": "api",
        "reasoner_preset": "photo",
        "api_model": "m",
    }
    assert [request["seed"] for request in api.requests] == [7, 7]
    assert api.headers[0]["Authorization"] == f"Bearer {KEY}"
    plain = generate(*ONE_STEP, "--prompt", "a fox in snow|a cat in snow", out="plain")
    assert [pixels(path) for path in (first, second)] == [pixels(path) for path in plain]
    for path in (first, second):
        assert KEY.encode() not in path.read_bytes()


def test_the_original_is_drawn_where_that_was_chosen(generate: Generate, api: ApiServer, caplog):
    api.reply = lambda body: refusal(400, f"no, {KEY}")
    (path,) = generate(*ONE_STEP, *flags(api, "--reasoner_failure", "original"), "--prompt", "a fox")
    assert read_settings(path).keys() == SETTINGS
    assert "refused (400: no, ***)" in caplog.text and KEY not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--reasoner", "me"], "--reasoner must be one of none, local, api"),
        (["--reasoner_preset", "poem"], "--reasoner_preset must be one of general"),
        (["--reasoner_failure", "x"], "--reasoner_failure must be one of error, original"),
        (["--reasoner", "api"], "--api_model"),
        (["--reasoner", "api", "--api_model", "m", "--api_url", "x"], "must begin with http"),
        (
            ["--reasoner", "api", "--api_model", "m", "--api_key_env", "NO_SUCH"],
            "NO_SUCH for the key is not set",
        ),
        (
            ["--reasoner", "api", "--api_model", "m", "--api_url", "http://127.0.0.1:9/v1"],
            "cannot be reached",
        ),
    ],
)
def test_one_sentence_and_no_picture(
    tiny_folder: Path, tmp_path: Path, cache_home: Path, capsys, changes: list[str], message: str
):
    fixed = ("--repo_id", tiny_folder, "--out", tmp_path / "out", "--prompt", "a fox", *ONE_STEP)
    assert cli.main(["generate", *map(str, fixed), *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
