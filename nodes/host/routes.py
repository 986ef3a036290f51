"""What the page asks the server: whether a choice fits this machine, what checkpoints are, an empty cache.

Anybody on the network may ask where ComfyUI listens there, and any web site may have a browser ask. So no
path is taken from a request: only names that the loaders list. What changes something is a POST from the
server's own page: ComfyUI compares Origin and Host on loopback addresses alone, this does everywhere.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from server import PromptServer

from ...lens_core.config import PLACEMENTS
from ...lens_core.errors import CheckpointError, LensError, SettingError
from ...lens_core.loading import DTYPES
from ...lens_core.needs import Picture
from ...lens_core.quant.policy import CHOICES, NONE
from . import budget, paths
from .feature_cache import free_features
from .missing import NONE_YET
from .settings import one_of

_DTYPES = ("auto", *DTYPES)
_EXPERTS = ("packed", "bfloat16")
# Larger than what any node offers, and small enough for arithmetic.
_LARGEST = {"width": 16384, "height": 16384, "batch": 4096, "steps": 10000, "tokens": 131072}
# Of a body that is an empty object.
_MOST_BYTES = 256


def register_routes() -> None:
    """Add them to ComfyUI's server, if there is one, and once: a second copy of the pack has the same."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    taken = {getattr(route, "path", None) for route in server.routes}
    for method, path, handler in (
        (server.routes.get, "/lens/memory", _memory),
        (server.routes.get, "/lens/variants", _variants),
        (server.routes.post, "/lens/feature_cache/clear", _clear_feature_cache),
    ):
        if path not in taken:
            method(path)(handler)


async def _memory(request: web.Request) -> web.Response:
    """GET ?model=&dtype=&quantization=&encoder=&placement=&experts=&width=&height=&batch=&steps=&tokens=, all
    but ``model`` optional: {level, needed, least, line, details}."""
    try:
        choice = choice_of(request.query)
    except SettingError as error:
        return _refused(400, str(error))
    try:
        found = await asyncio.to_thread(_verdict, choice)
    except CheckpointError as error:
        return _refused(404, str(error))
    except LensError as error:
        return _refused(422, str(error))
    return web.json_response(asdict(found))


async def _variants(_: web.Request) -> web.Response:
    """GET: {option of LensModelLoader: {variant, steps, cfg}}."""
    found = await asyncio.to_thread(budget.variants)
    return web.json_response(
        {
            name: {"variant": variant.name, "steps": variant.steps, "cfg": variant.cfg}
            for name, variant in found.items()
        }
    )


async def _clear_feature_cache(request: web.Request) -> web.Response:
    """POST {}, as application/json: {freed: bytes}."""
    reason = why_not_ours(request.headers)
    if reason is not None:
        return _refused(403, reason)
    if request.content_type != "application/json":
        return _refused(415, f"The body is {request.content_type}; expected application/json. Send {{}}.")
    try:
        body = await request.content.readexactly(_MOST_BYTES + 1)
        return _refused(413, f"The body has more than {len(body) - 1} bytes; expected {{}}.")
    except asyncio.IncompleteReadError as error:
        body = error.partial
    if not _is_empty_object(body):
        return _refused(400, "The body is no empty JSON object. Send {}.")
    return web.json_response({"freed": await asyncio.to_thread(free_features)})


def choice_of(query: Mapping[str, str]) -> budget.Choice:
    """What a query asks about, names unchecked; raises SettingError for values that no node offers."""

    def number(name: str, usual: int) -> int:
        text = query.get(name, str(usual))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 0 < int(text) <= _LARGEST[name]):
            raise SettingError(
                f"{name} is {text[:20]!r}; expected a whole number from 1 to {_LARGEST[name]}."
            )
        return int(text)

    def option(name: str, usual: str, options: tuple[str, ...]) -> str:
        return one_of(name, query.get(name, usual)[:40], options)

    model = query.get("model", "")
    if not model:
        raise SettingError("model is missing; expected a name from LensModelLoader's list.")
    return budget.Choice(
        model,
        option("dtype", "auto", _DTYPES),
        option("quantization", NONE, CHOICES),
        query.get("encoder", ""),
        option("placement", "auto", PLACEMENTS),
        option("experts", _EXPERTS[0], _EXPERTS) == _EXPERTS[1],
        Picture(
            number("height", 1024),
            number("width", 1024),
            number("batch", 1),
            number("tokens", 200),
            number("steps", 20),
        ),
    )


def why_not_ours(headers: Mapping[str, str]) -> str | None:
    """Why a request is none of this server's own page, in words; None where it may be. Programs send neither
    header; a browser sends them for every page, and no page can change them."""
    site = headers.get("Sec-Fetch-Site", "same-origin")
    if site not in ("same-origin", "none"):
        return "The request comes from another web site. Use ComfyUI's own page."
    origin, host = headers.get("Origin"), headers.get("Host", "")
    if origin is None:
        return None
    try:
        parts = urlsplit(origin)
        own = parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()
    except ValueError:
        own = False
    return None if own else "The request's Origin is not this server. Use ComfyUI's own page."


def _verdict(choice: budget.Choice) -> Any:
    for component, name in (("denoiser", choice.model), ("encoder", choice.encoder)):
        if name and (name == NONE_YET or name not in paths.choices(component)):
            raise CheckpointError(
                f"There is no such {component} in the loader's list. Press R, and choose one."
            )
    return budget.verdict(choice)


def _is_empty_object(body: bytes) -> bool:
    try:
        return json.loads(body) == {}
    except (ValueError, RecursionError):
        return False


def _refused(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)
