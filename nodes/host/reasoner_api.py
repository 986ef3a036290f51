"""A prompt rewritten by a server, with ComfyUI's Cancel; what failed is asked again the next time."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import Any

import comfy.model_management

from ...lens_core.errors import ReasonerError, SettingError
from ...lens_core.reasoner import PRESETS, Rewritten, rewrite
from ...lens_core.reasoner.remote import EFFORTS, Generation, ask
from ...lens_core.reasoner.server import Server, default_url
from .progress import say
from .settings import one_of

log = logging.getLogger(__name__)

ERROR, ORIGINAL = "error", "original prompt"
ON_FAILURE = (ERROR, ORIGINAL)
# ComfyUI keeps what a node gave as long as its inputs are the same. By address: how often the original
# prompt was given for want of an answer.
_failures: Counter[str] = Counter()


def failures(address: str | None) -> int:
    """A number that changes with each failure of this server; of any, where a link brings the address."""
    return _failures.total() if address is None else _failures[address]


def rewrite_by_api(
    prompt: str,
    preset: str,
    address: str,
    model: str,
    generation: Generation,
    *,
    timeout: float,
    on_failure: str,
    node_id: str | None,
) -> str:
    """The prompt to draw, also shown on the node; ``address`` blank is the environment's own server.

    Raises ReasonerError where there is no answer, unless ``on_failure`` is ORIGINAL, SettingError for
    settings that cannot be, and MissingPackage.
    """
    _check(prompt, preset, generation.effort, on_failure)
    server = Server(address.strip() or default_url(), model, timeout=timeout)
    cancelled = comfy.model_management.throw_exception_if_processing_interrupted
    say(f"Waiting for {model} …", node_id)
    answer = partial(ask, server, generation=generation, check=cancelled)
    try:
        result = rewrite(prompt, preset, answer)
    except ReasonerError as error:
        if on_failure == ERROR:
            raise
        _failures[address] += 1
        result = Rewritten(prompt, f"{error} The prompt stays as it was.")
    if result.warning:
        log.warning("%s", result.warning)
    say("\n\n".join(filter(None, (result.warning, result.prompt))), node_id)
    return result.prompt


def _check(prompt: Any, preset: str, effort: str, on_failure: str) -> None:
    if not isinstance(prompt, str):
        raise SettingError(f"The prompt is a {type(prompt).__name__}; expected text. Connect a STRING.")
    one_of("preset", preset, PRESETS)
    one_of("effort", effort, EFFORTS)
    one_of("on_failure", on_failure, ON_FAILURE)
