"""Where the reasoner's server is, and which key may go there.

The key comes from the environment alone. A workflow from a stranger may name any server, so a key goes only
to the server that the environment names too, unless the user gives variable and server together.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import SettingError

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Server:
    """Where to ask. ``key_variable`` None is OPENAI_API_KEY, for the environment's own server alone;
    ``timeout`` is in seconds, for one answer with all its retries."""

    url: str
    model: str
    key_variable: str | None = None
    timeout: float = 60.0


def default_url() -> str:
    """The environment's server, or else OpenAI's."""
    return os.environ.get(URL_VARIABLE, "").strip() or OPENAI_URL


def check_server(server: Server) -> None:
    """Raise SettingError for an address, a model's name, a timeout or a key that cannot be."""
    try:
        parts = urlsplit(server.url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        whole = known and re.fullmatch(r"[!-~]+", server.url) is not None
    except ValueError:
        whole = False
    if not whole:
        raise SettingError(
            f"The API's address must begin with http:// or https:// and name a server, got {server.url!r}. "
            "One on this machine is for example http://127.0.0.1:8080/v1"
        )
    if parts.username is not None or parts.password is not None or parts.query:
        raise SettingError(
            "The API's address holds a user, a password or a query, which would be kept in workflows and "
            f"pictures. Put the key into the environment variable {KEY_VARIABLE} instead."
        )
    if not server.model.strip():
        raise SettingError("The API's model has no name. Give the one that the server lists for it.")
    if not 0 < server.timeout < float("inf"):
        raise SettingError(f"The timeout must be above 0 seconds, got {server.timeout}.")
    if server.key_variable is not None and not os.environ.get(server.key_variable):
        raise SettingError(f"The environment variable {server.key_variable} for the key is not set.")
    if not re.fullmatch(r"[!-~]*", key_for(server) or ""):
        name = server.key_variable or KEY_VARIABLE
        raise SettingError(f"The key in {name} holds a space or a letter that no key has. Set it again.")


def key_for(server: Server) -> str | None:
    """The key that may go to this server, if any."""
    if server.key_variable is not None:
        return os.environ.get(server.key_variable)
    return os.environ.get(KEY_VARIABLE) if is_own(server.url) else None


def origin(url: str) -> str:
    """Scheme and server of an address, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def is_own(url: str) -> bool:
    """Whether the environment names this server, so that what it holds for one may go there."""
    try:
        return _address(url) == _address(default_url())
    except ValueError:  # no address at all in the environment
        return False


def _address(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port
