"""What the page is sent while our sampler runs on a server that was started without a word about previews."""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import ClientSession, WSMsgType

from scripts.comfy_server import ComfyServer

# ComfyUI's number of a message that is a picture: four bytes, then the format in four more.
PREVIEW_IMAGE, JPEG = 1, 1
STEPS = 3


async def previews(server: ComfyServer, prompt: dict[str, Any], method: str) -> int:
    """Pictures that arrive while a prompt runs."""
    url, page, count = server.url, uuid.uuid4().hex, 0
    async with ClientSession() as session, session.ws_connect(f"{url}/ws?clientId={page}") as socket:
        body = {"prompt": prompt, "extra_data": {"preview_method": method}, "client_id": page}
        async with session.post(f"{url}/api/prompt", json=body) as answer:
            assert answer.status == 200, await answer.text()
        async for message in socket:
            if message.type == WSMsgType.BINARY:
                kind, form = struct.unpack(">II", message.data[:8])  # others are the nodes' lines of text
                count += kind == PREVIEW_IMAGE
                assert kind != PREVIEW_IMAGE or (form == JPEG and message.data[8:10] == b"\xff\xd8")
            elif '"execution_success"' in message.data:
                return count
            assert '"execution_error"' not in str(message.data)
    raise AssertionError("the server hung up")


@pytest.mark.parametrize(
    "seed, method, count", [(71, "default", STEPS), (72, "none", 0), (73, "auto", STEPS)]
)
def test_previews_arrive_unless_the_page_wants_none(
    server: ComfyServer, picture_prompt: Callable[..., dict[str, Any]], seed: int, method: str, count: int
):
    prompt = picture_prompt(sampler__seed=seed, sampler__steps=STEPS)
    assert asyncio.run(asyncio.wait_for(previews(server, prompt, method), 120)) == count
