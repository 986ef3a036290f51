"""The page's routes on a running server: what they answer, and that hostile requests get a 4xx and change
nothing."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from scripts.comfy_server import ComfyServer

CLEAR = "/lens/feature_cache/clear"
JSON = {"Content-Type": "application/json"}
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def ask(server: ComfyServer) -> Ask:
    """Sends a request as it is given, its path not put right; returns the status and the JSON."""

    def send(path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.headers.get_content_type()
            return answer.status, json.loads(content) if kind == "application/json" else None
        finally:
            connection.close()

    return send


@pytest.fixture
def entry(server: ComfyServer) -> Path:
    """Kept features that only a proper request may delete."""
    path = server.base / "user" / "__lens" / "features" / f"{'ab' * 32}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(1000))
    return path


def memory(**query: Any) -> str:
    return f"/lens/memory?{urlencode({'model': 'Lens-tiny', **query})}"


def test_variants(ask: Ask):
    status, found = ask("/lens/variants")
    assert status == 200
    assert found["lens_turbo_tiny_bf16.safetensors"] == {"variant": "Lens-Turbo", "steps": 4, "cfg": 1.0}
    assert found["Lens-tiny"] == {"variant": "Lens", "steps": 20, "cfg": 5.0}
    assert "gpt_oss_tiny_mxfp4.safetensors" not in found


def test_memory_of_a_choice(ask: Ask):
    status, alone = ask(memory())
    assert status == 200 and alone["level"] == "green" and alone["line"].startswith("✓ CPU: needs about ")
    assert alone["details"][0].startswith("For 1 x 1024x1024: the denoiser;")
    status, small = ask(memory(width=256, height=512, batch=2, quantization="int8_dynamic", steps=4))
    assert status == 200 and small["details"][0].startswith("For 2 x 256x512: the denoiser;")
    assert small["needed"] < alone["needed"]
    status, both = ask(memory(encoder="gpt_oss_tiny_mxfp4.safetensors", placement="stream"))
    assert status == 200 and both["needed"] > alone["needed"]
    assert "the text encoder and the denoiser" in both["details"][0]


NAMES = [
    "../lens/Lens-tiny",
    "../../../../etc/passwd",
    "..\\..\\secret.safetensors",
    "/etc/passwd",
    "C:\\Windows\\win.ini",
    "\\\\host\\share\\x.safetensors",
    "file:///etc/passwd",
    "Lens-tiny/../Lens-tiny",
    "./Lens-tiny",
    "Lens-tiny\0.safetensors",
    "..%2f..%2fetc%2fpasswd",
    "none yet: run for links",
    "no such file",
    "\ud83d\ude00\u202e",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("what", ["model", "encoder"])
def test_only_listed_names_are_looked_at(ask: Ask, name: str, what: str):
    text = name.encode("utf-16", "surrogatepass").decode("utf-16")
    status, answer = ask(memory(**{what: text}))
    assert status == 404 and answer["error"].startswith("There is no such")
    assert "/" not in answer["error"], "a path"


@pytest.mark.parametrize(
    "query",
    [
        *(
            {"width": value}
            for value in ("0", "-1", "1e3", "", "x", "1.5", "9" * 400, "16385", "\u0661", "NaN")
        ),
        *({"batch": value} for value in ("0", "4097", "[]")),
        *({name: "x" * 5000} for name in ("quantization", "placement", "dtype", "experts")),
        {"model": ""},
    ],
    ids=str,
)
def test_other_values_are_refused(ask: Ask, query: dict[str, str]):
    status, answer = ask(memory(**query))
    assert status == 400 and "expected" in answer["error"]
    assert len(answer["error"]) < 400


@pytest.mark.parametrize(
    "path",
    ["/lens/memory", "/lens/memory?model", memory() + "&x=" + "y" * 20000, "/lens/memory/../../etc/passwd"],
)
def test_malformed_requests(ask: Ask, path: str):
    assert 400 <= ask(path)[0] < 500


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", [memory(), "/lens/variants"])
def test_what_reads_is_no_post(ask: Ask, path: str, method: str):
    assert ask(path, method, "{}", **JSON)[0] in (404, 405)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_what_deletes_is_a_post(ask: Ask, entry: Path, method: str):
    assert ask(CLEAR, method, "{}", **JSON)[0] in (404, 405)
    assert entry.exists()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://evil.example@127.0.0.1:{port}"},
        {"Origin": "file://127.0.0.1:{port}"},
        {"Origin": "http://192.168.1.6:8188", "Host": "192.168.1.5:8188"},
        {"Origin": "http://192.168.1.5:9999", "Host": "192.168.1.5:8188"},
        {"Sec_Fetch_Site": "same-site", "Host": "192.168.1.5:8188"},
        {"Sec_Fetch_Site": "cross-site", "Host": "192.168.1.5:8188"},
    ],
    ids=str,
)
def test_other_sites_delete_nothing(ask: Ask, server: ComfyServer, entry: Path, headers: dict[str, str]):
    """Also with the Host of a server that listens on the network, where ComfyUI itself lets them through."""
    given = {name: value.format(port=server.port) for name, value in headers.items()}
    assert 400 <= ask(CLEAR, "POST", "{}", **JSON, **given)[0] < 500
    assert entry.exists()


@pytest.mark.parametrize(
    "body, headers, status",
    [
        ("{}", {}, 415),
        ("{}", {"Content-Type": "text/plain"}, 415),
        ("a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (" " * 100_000, JSON, 413),
        ('{"path": "/etc"}', JSON, 400),
        ("[]", JSON, 400),
        ("0", JSON, 400),
        ("", JSON, 400),
        ("{", JSON, 400),
        ("[" * 250, JSON, 400),
        (b"\xff\xfe\x00", JSON, 400),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_bodies_delete_nothing(ask: Ask, entry: Path, body: Any, headers: dict[str, str], status: int):
    assert ask(CLEAR, "POST", body, **headers)[0] == status
    assert entry.exists()


def test_a_body_without_an_end_is_not_read_to_it(ask: Ask, entry: Path):
    """Chunked, so that its length is not told."""
    assert ask(CLEAR, "POST", iter([b" " * 1000] * 100), **JSON)[0] == 413
    assert entry.exists()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1:{port}", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "https://Lens.Example", "Host": "lens.example", "Sec_Fetch_Site": "same-origin"},
    ],
    ids=["a program", "the page", "the page behind a proxy"],
)
def test_the_servers_own_page_clears_the_cache(
    ask: Ask, server: ComfyServer, entry: Path, headers: dict[str, str]
):
    given = {name: value.format(port=server.port) for name, value in headers.items()}
    status, answer = ask(CLEAR, "POST", "{}", **JSON, **given)
    assert status == 200 and answer["freed"] >= 1000
    assert not entry.exists()
    assert ask(CLEAR, "POST", "{}", **JSON) == (200, {"freed": 0})
