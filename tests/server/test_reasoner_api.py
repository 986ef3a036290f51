"""LensReasonerAPI on a real ComfyUI, asking a real server: the picture, the failures, Cancel, and the key."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from scripts.comfy_server import ComfyServer, error_of
from tests.api_server import ApiServer, refusal, serving
from tests.server.conftest import KEY

Prompt = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _fresh(api: ApiServer) -> Iterator[None]:
    api.requests.clear()
    api.headers.clear()
    api.left.clear()
    yield
    api.reply, api.delay = lambda body: "a rewritten prompt", 0.0


def asking(**changes: Any) -> dict[str, Any]:
    """The node alone, and one that shows its text."""
    inputs = {
        "prompt": "a fox",
        "preset": "short",
        "model": "m",
        "api_url": "",
        "seed": 0,
        "temperature": 0.7,
        "max_new_tokens": 100,
        "effort": "default",
        "timeout": 30.0,
        "on_failure": "error",
    }
    assert changes.keys() <= inputs.keys()
    return {
        "reasoner": {"class_type": "LensReasonerAPI", "inputs": {**inputs, **changes}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["reasoner", 0]}},
    }


def shown(server: ComfyServer, **changes: Any) -> str:
    entry = server.wait(server.queue(asking(**changes)))
    assert error_of(entry) is None, error_of(entry)
    return entry["outputs"]["show"]["text"][0]


def failed(server: ComfyServer, **changes: Any) -> str:
    entry = server.wait(server.queue(asking(**changes)))
    assert KEY not in json.dumps(entry)
    error = error_of(entry)
    assert error is not None
    return error["exception_message"]


def test_its_prompt_is_drawn_and_the_key_is_nowhere(
    server: ComfyServer, api: ApiServer, picture_prompt: Prompt
):
    prompt = picture_prompt(text__prompt=["reasoner", 0])
    prompt["reasoner"] = asking(seed=1)["reasoner"]
    entry = server.wait(server.queue(prompt, {"nodes": []}))
    assert error_of(entry) is None
    assert api.headers[0]["Authorization"] == f"Bearer {KEY}"
    (path,) = server.images(entry)
    with Image.open(path) as image:
        assert "reasoner" in image.text["prompt"]
        assert KEY not in json.dumps(image.text)
    assert KEY.encode() not in path.read_bytes()
    assert KEY not in json.dumps(server.get("/api/history"))
    assert KEY not in json.dumps(server.get("/api/object_info/LensReasonerAPI"))
    assert KEY not in server.log.read_text()


def test_the_same_inputs_are_asked_once(server: ComfyServer, api: ApiServer):
    assert shown(server, seed=2) == shown(server, seed=2) == "a rewritten prompt"
    assert len(api.requests) == 1
    shown(server, seed=3)
    assert len(api.requests) == 2


def test_a_refusal_is_one_sentence_without_the_key(server: ComfyServer, api: ApiServer):
    api.reply = lambda body: refusal(401, f"Incorrect API key: {KEY}")
    message = failed(server, seed=4)
    assert message.startswith(
        f"The API at {api.url.removesuffix('/v1')} refused (401: Incorrect API key: ***)"
    )
    assert KEY not in server.log.read_text()


def test_after_a_failure_the_original_is_drawn_and_the_next_run_asks_again(
    server: ComfyServer, api: ApiServer
):
    chosen = {"seed": 5, "on_failure": "original prompt"}
    api.reply = lambda body: refusal(400, "no")
    assert shown(server, **chosen) == "a fox"
    api.reply = lambda body: "at last"
    assert shown(server, **chosen) == "at last"
    asked = len(api.requests)
    assert shown(server, **chosen) == "at last"
    assert len(api.requests) == asked


def test_a_server_that_the_environment_does_not_name_gets_no_key(server: ComfyServer):
    with serving() as other:
        assert shown(server, seed=6, api_url=other.url) == "a rewritten prompt"
        assert KEY not in str(other.headers)


def test_cancel_does_not_wait_for_the_answer(server: ComfyServer, api: ApiServer):
    api.delay = 60
    running = server.queue(asking(seed=7))
    end = time.monotonic() + 20
    while not api.requests and time.monotonic() < end:
        time.sleep(0.02)
    server.post("/api/interrupt")
    assert api.left.wait(10)
    assert error_of(server.wait(running, 20)) is None
    api.delay = 0.0
    assert shown(server, seed=8) == "a rewritten prompt"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"api_url": "file:///etc/passwd"}, "must begin with http:// or https://"),
        ({"model": ""}, "has no name"),
    ],
)
def test_settings_that_cannot_be_are_errors_even_where_the_original_would_do(
    server: ComfyServer, changes: dict, sentence: str
):
    assert sentence in failed(server, seed=9, on_failure="original prompt", **changes)
