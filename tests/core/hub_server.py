"""A Hugging Face hub on this machine: the listing and the files of a few repositories, and their troubles."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


@dataclass
class Hub:
    """What the server has and does, and the requests that came: (path, Range or None)."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    # By repository: an HTTP status instead of an answer, or seconds to wait before it.
    refused: dict[str, int] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)
    # By repository: the SHA-256 that it claims instead of the true one.
    claimed: dict[str, str] = field(default_factory=dict)
    # Bytes after which the next transfers break off, one for each.
    cuts: list[int] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def listing(self, repository: str) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": "0" * 40,
                "lfs": self._lfs(repository, content) if name.endswith((".safetensors", ".gguf")) else None,
            }
            for name, content in self.files[repository].items()
        ]
        return {"id": repository, "sha": COMMIT, "siblings": siblings}

    def _lfs(self, repository: str, content: bytes) -> dict[str, Any]:
        digest = self.claimed.get(repository) or hashlib.sha256(content).hexdigest()
        return {"size": len(content), "sha256": digest, "pointerSize": 134}

    def transfers(self) -> list[tuple[str, str | None]]:
        """The requests for files: (name, Range)."""
        return [(path.partition(COMMIT + "/")[2], part) for path, part in self.requests if COMMIT in path]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run it on a free port of the loopback."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((path, self.headers.get("Range")))
            api = path.removeprefix("/api/models/")
            repository = "/".join(api.strip("/").split("/")[:2])
            if repository in hub.slow:
                time.sleep(hub.slow[repository])
            if repository in hub.refused:
                self._send(hub.refused[repository], b"{}")
            elif repository not in hub.files:
                self._send(404, b"{}")
            elif api != path:
                self._send(200, json.dumps(hub.listing(repository)).encode())
            else:
                self._send_file(hub.files[repository].get(path.partition(COMMIT + "/")[2]))

        def _send_file(self, content: bytes | None) -> None:
            if content is None:
                return self._send(404, b"")
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            end = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers = {"Content-Range": end} if start else {}
            self._send(206 if start else 200, content[start:], headers, cut=True)
            return None

        def _send(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: hub.cuts.pop(0)] if cut and hub.cuts else body)
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
