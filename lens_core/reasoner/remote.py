"""The reasoner on a server that speaks OpenAI's API: OpenAI's own, or any other, on this machine or not.

The key comes from the environment alone. A workflow from a stranger may name any server, so a key goes only
to the server that the environment names too, unless the user gives variable and server together. No error
shows a key, though a server may send it back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .. import harmony
from ..errors import MissingPackage, ReasonerError, SettingError
from ..harmony import Conversation

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"
EFFORT_UNSET = "default"
EFFORTS = (EFFORT_UNSET, *harmony.EFFORTS)
# What the library wants where there is no key; servers without keys ignore it.
_NO_KEY = "none"
# How often Cancel is looked for, in seconds.
_PATIENCE = 0.1
_SHOWN = 300
_THOUGHT = ("<think>", "</think>")


@dataclass(frozen=True)
class Server:
    """Where to ask. ``key_variable`` None is OPENAI_API_KEY, for the environment's own server alone;
    ``timeout`` is in seconds, for one answer with all its retries."""

    url: str
    model: str
    key_variable: str | None = None
    timeout: float = 60.0


@dataclass(frozen=True)
class Generation:
    """How to answer; servers that refuse one of these by name are asked without it."""

    seed: int = 0
    temperature: float = 0.7
    max_new_tokens: int = 4096
    effort: str = EFFORT_UNSET

    def parameters(self) -> dict[str, Any]:
        """Under the names of the API."""
        effort = {} if self.effort == EFFORT_UNSET else {"reasoning_effort": self.effort}
        # Servers read the seed as a signed integer.
        seed = self.seed % 2**63
        return {
            "seed": seed,
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            **effort,
        }


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
    return os.environ.get(KEY_VARIABLE) if _is_own(server.url) else None


def ask(
    server: Server,
    conversation: Conversation,
    generation: Generation | None = None,
    check: Callable[[], None] = lambda: None,
) -> str:
    """The server's answer to a conversation.

    ``check`` is called ten times a second meanwhile and may raise, which ends the request. Raises
    ReasonerError where there is no answer, SettingError for a server that cannot be, MissingPackage.
    """
    openai = _openai()
    check_server(server)
    secret = key_for(server)
    parameters = (generation or Generation()).parameters()
    try:
        completion = _watched(lambda: _complete(openai, server, secret, conversation, parameters), check)
        return _without(secret, _answer(completion, server))
    except openai.OpenAIError as error:
        reason = _reason(openai, error, server, secret)
    except TimeoutError:
        reason = f"gave no answer in {server.timeout:g} s. Raise the timeout, or choose a faster model"
    except (ValueError, RecursionError):
        reason = "did not answer in JSON. Does its address end in /v1?"
    # Not from the library's error: a server may have written the key into that, and logs print it whole.
    raise ReasonerError(f"The API at {_origin(server.url)} {reason}.")


async def _complete(
    openai: Any, server: Server, secret: str | None, conversation: Conversation, parameters: dict[str, Any]
) -> Any:
    import anyio

    messages = [
        {"role": "system", "content": harmony.valid_text(conversation.instructions)},
        {"role": "user", "content": harmony.valid_text(conversation.prompt)},
    ]
    own = {} if _is_own(server.url) else _nothing_else(openai)
    with anyio.fail_after(server.timeout):
        async with openai.AsyncOpenAI(
            base_url=server.url, api_key=secret or _NO_KEY, timeout=server.timeout, **own
        ) as client:
            while True:
                try:
                    return await client.chat.completions.create(
                        model=server.model, messages=messages, **parameters
                    )
                except openai.BadRequestError as error:
                    refused = str(error.param)  # whatever the server put there
                    if refused not in parameters:
                        raise
                    parameters = _without_parameter(parameters, refused)


def _without_parameter(parameters: dict[str, Any], refused: str) -> dict[str, Any]:
    """The same without one; OpenAI's newer models know max_tokens under another name."""
    rest = {name: value for name, value in parameters.items() if name != refused}
    return rest | {"max_completion_tokens": parameters[refused]} if refused == "max_tokens" else rest


def _nothing_else(openai: Any) -> dict[str, Any]:
    """Without what the library would add of the environment, which is meant for another server."""
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
    names = [line.partition(":")[0].strip() for line in lines if ":" in line]
    return {"organization": "", "project": "", "default_headers": dict.fromkeys(names, openai.Omit())}


def _watched(work: Callable[[], Coroutine[Any, Any, Any]], check: Callable[[], None]) -> Any:
    """The result of ``work``, run in a thread of its own and cancelled if ``check`` raises."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal:
        future = portal.start_task_soon(work)
        try:
            while not wait([future], _PATIENCE).done:
                check()
        except BaseException:
            future.cancel()
            raise
        return future.result()


def _answer(completion: Any, server: Server) -> str:
    try:
        choice = completion.choices[0]
        text = choice.message.content or ""
    except (AttributeError, IndexError, TypeError):
        raise ValueError("no chat completion") from None
    if not isinstance(text, str):
        raise ValueError("a message that is no text")
    text = _spoken(text).strip()
    if not text:
        reason = (
            "used up max_new_tokens before the answer began. Raise it, or lower the effort"
            if getattr(choice, "finish_reason", None) == "length"
            else "sent an empty answer. Try another seed or model"
        )
        raise ReasonerError(f"The API at {_origin(server.url)} {reason}.")
    return text


def _spoken(text: str) -> str:
    """Without thoughts that the server left in it."""
    begin, end = _THOUGHT
    if text.lstrip().startswith(begin):
        return text.partition(end)[2]
    return harmony.answer_in(text)


def _reason(openai: Any, error: Any, server: Server, secret: str | None) -> str:
    """What the library's error means, to follow the name of the server."""
    if isinstance(error, openai.APITimeoutError):
        return f"gave no answer in {server.timeout:g} s. Raise the timeout, or choose a faster model"
    if isinstance(error, openai.APIConnectionError):
        return "cannot be reached. Is it running, and is its address right?"
    if not isinstance(error, openai.APIStatusError):
        return "answered with something else than a chat completion. Does its address end in /v1?"
    said = _without(secret, _message(error.body) or str(error.message))
    advice = {
        401: _key_advice(server),
        403: _key_advice(server),
        404: f"does it know the model {server.model!r}, and does its address end in /v1?",
        429: "too many requests, or the account's means are used up; wait and try again",
    }.get(error.status_code, "see the server's log")
    return f"refused ({error.status_code}: {_shortened(said)}): {advice}"


def _key_advice(server: Server) -> str:
    if server.key_variable is not None:
        return f"the key in {server.key_variable} is not accepted"
    if not _is_own(server.url):
        return (
            f"a key goes only to the server that the environment names. Start with {URL_VARIABLE} set to "
            f"this address and {KEY_VARIABLE} to its key"
        )
    if not os.environ.get(KEY_VARIABLE):
        return f"set the environment variable {KEY_VARIABLE} to your key before starting"
    return f"the key in {KEY_VARIABLE} is not accepted"


def _message(body: object) -> str:
    """The server's own sentence in the body of a refusal, as OpenAI, vLLM and others send it."""
    while isinstance(body, Mapping):
        body = next((body[name] for name in ("error", "message", "detail") if body.get(name)), "")
    return body if isinstance(body, str) else ""


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."


def _without(secret: str | None, text: str) -> str:
    return text.replace(secret, "***") if secret else text


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _is_own(url: str) -> bool:
    """Whether the environment names this server, so that what it holds for one may go there."""
    try:
        return _address(url) == _address(default_url())
    except ValueError:  # no address at all in the environment
        return False


def _address(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port


def _openai() -> Any:
    try:
        import openai

        openai.AsyncOpenAI, openai.Omit  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise MissingPackage(
            "Asking an API needs the openai package, 2.0 or newer: pip install 'openai>=2'."
        ) from error
    return openai
