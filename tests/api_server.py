"""A server on the loopback that speaks OpenAI's API, and every trouble that such a server has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Body = dict[str, Any]


def completion(text: str | None, finish: str = "stop") -> Body:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }


def refusal(status: int, message: str, **more: Any) -> web.Response:
    """An error as OpenAI sends it; the client may try again at once."""
    return web.json_response(
        {"error": {"message": message, **more}}, status=status, headers={"retry-after-ms": "1"}
    )


@dataclass
class ApiServer:
    """``reply`` makes the answer: a text, a body or a response; ``requests`` are the bodies that came."""

    reply: Callable[[Body], Any] = lambda body: "a rewritten prompt"
    delay: float = 0.0
    url: str = ""
    requests: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    # Set when a client hung up before its answer.
    left: threading.Event = field(default_factory=threading.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.left.set()
            raise
        answer = self.reply(body)
        if isinstance(answer, web.Response):
            return answer
        return web.json_response(completion(answer) if isinstance(answer, str) else answer)


@contextmanager
def serving() -> Iterator[ApiServer]:
    """Run it on a free port until the end of the block."""
    server, loop, ready = ApiServer(), asyncio.new_event_loop(), threading.Event()
    application = web.Application()
    application.router.add_post("/v1/chat/completions", server.handle)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    def run() -> None:
        loop.run_until_complete(start())
        loop.call_soon(ready.set)
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield server
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
