"""The reasoner on a server that speaks OpenAI's API: OpenAI's own, or any other, on this machine or not.

No error shows the key, though a server may send it back. Which key goes where is said in ``server``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

from .. import harmony
from ..errors import MissingPackage, ReasonerError
from ..harmony import Conversation
from .server import KEY_VARIABLE, URL_VARIABLE, Server, check_server, is_own, key_for, origin

EFFORT_UNSET = "default"
EFFORTS = (EFFORT_UNSET, *harmony.EFFORTS)
# What the library wants where there is no key; servers without keys ignore it.
_NO_KEY = "none"
# How often Cancel is looked for, in seconds.
_PATIENCE = 0.1
_SHOWN = 300
_THOUGHT = ("<think>", "</think>")


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
    raise ReasonerError(f"The API at {origin(server.url)} {reason}.")


async def _complete(
    openai: Any, server: Server, secret: str | None, conversation: Conversation, parameters: dict[str, Any]
) -> Any:
    import anyio

    messages = [
        {"role": "system", "content": harmony.valid_text(conversation.instructions)},
        {"role": "user", "content": harmony.valid_text(conversation.prompt)},
    ]
    own = {} if is_own(server.url) else _nothing_else(openai)
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
        raise ReasonerError(f"The API at {origin(server.url)} {reason}.")
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
    if not is_own(server.url):
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


def _openai() -> Any:
    try:
        import openai

        openai.AsyncOpenAI, openai.Omit  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise MissingPackage(
            "Asking an API needs the openai package, 2.0 or newer: pip install 'openai>=2'."
        ) from error
    return openai
