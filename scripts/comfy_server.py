"""Runs a real ComfyUI server with this pack, and talks to it as its own page does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[1]


class ComfyServer:
    """ComfyUI with its own base folder, so that its checkout is never written to; on the CPU unless
    ``arguments`` for its main.py say otherwise.

    ``base`` gets custom_nodes (a link to the pack, named ``folder``), input, output, temp and user;
    ``models`` becomes its models folder. ``comfyui`` is the checkout, COMFYUI_PATH by default. Use it as a
    context manager.
    """

    def __init__(
        self,
        base: Path,
        models: Path,
        arguments: Sequence[str] = ("--cpu",),
        folder: str = "ComfyUI-Lens",
        comfyui: Path | None = None,
    ) -> None:
        self.base, self.models, self.arguments, self.folder = base, models, arguments, folder
        self.comfyui = comfyui or Path(os.environ["COMFYUI_PATH"])
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        for name in ("custom_nodes", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
            (self.models / kind).mkdir(parents=True, exist_ok=True)
        for link, target in (("models", self.models), (f"custom_nodes/{self.folder}", PACK)):
            if not (self.base / link).is_symlink():  # it is there where a server has run before
                (self.base / link).symlink_to(target, target_is_directory=True)
        command = [sys.executable, "main.py", "--port", str(self.port), "--listen", "127.0.0.1"]
        command += ["--disable-auto-launch", "--base-directory", str(self.base)]
        command += ["--database-url", "sqlite:///:memory:", *self.arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.comfyui, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._wait_until_up()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _wait_until_up(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.get("/api/object_info/LensSampler")
                return
            time.sleep(0.1)
        raise RuntimeError(f"ComfyUI did not answer:\n{self.log.read_text()[-3000:]}")

    def get(self, path: str) -> Any:
        """GET, decoded from JSON."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def queue(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None) -> str:
        """Submit an API prompt; returns its id. Raises PromptRejected with ComfyUI's reasons."""
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        body = {"prompt": prompt, "extra_data": extra, "client_id": uuid.uuid4().hex}
        request = urllib.request.Request(
            self.url + "/api/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptRejected(error.read().decode()) from error

    def post(self, path: str, body: dict[str, Any] | None = None) -> None:
        """POST a JSON object, an empty one by default."""
        content = json.dumps(body or {}).encode()
        kind = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(self.url + path, content, kind), timeout=30)

    def free(self, seconds: float = 30) -> int:
        """Unload all models and forget all results, as the page's button does; bytes that the device has free
        once the server is done with it. It collects its garbage some seconds later; of RAM, where others come
        and go, no steady figure is waited for."""
        self.post("/api/free", {"unload_models": True, "free_memory": True})
        end, seen = time.monotonic() + seconds, [0]
        while time.monotonic() < end and (len(seen) < 4 or len(set(seen[-4:])) > 1):
            time.sleep(1)
            device = self.get("/api/system_stats")["devices"][0]
            seen.append(device["vram_free"])
            if device["type"] == "cpu":
                break
        return seen[-1]

    def wait(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """The history entry of a prompt once it has ended, however it ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/api/history/{prompt_id}").get(prompt_id)
            if entry and entry["status"]["status_str"] in ("success", "error"):
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} did not end:\n{self.log.read_text()[-3000:]}")

    def wait_until_running(self, prompt_id: str, seconds: float = 60) -> None:
        """Return once a prompt is being executed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            running = self.get("/api/queue")["queue_running"]
            if any(prompt_id in item for item in running):
                return
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} did not start")

    def images(self, entry: dict[str, Any]) -> list[Path]:
        """Paths of the pictures that a prompt saved."""
        files = [image for node in entry["outputs"].values() for image in node.get("images", ())]
        return [self.base / file["type"] / file["subfolder"] / file["filename"] for file in files]


class PromptRejected(Exception):
    """ComfyUI's validation refused a prompt; the text is its JSON answer."""


def error_of(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The execution error in a history entry, as the page would show it."""
    for kind, detail in entry["status"]["messages"]:
        if kind == "execution_error":
            return detail
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
