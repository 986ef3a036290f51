"""Out of memory is an answer, not the end: free what can be freed, try once more with less, then say why."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..errors import LensError

log = logging.getLogger(__name__)
T = TypeVar("T")


class OutOfMemory(LensError, torch.OutOfMemoryError):
    """Both attempts ran out of memory. A ``torch.OutOfMemoryError`` too, so that a host knows what it is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory ran out; RAM's own end is another error."""
    return isinstance(error, torch.OutOfMemoryError) and not isinstance(error, OutOfMemory)


def shortage(what: str, needed: float | None, free: float | None, advice: Sequence[str]) -> OutOfMemory:
    """The error to end with: ``what`` was done ("while decoding"), the bytes that it needs and that are free
    (None: unknown), and what to try instead. ComfyUI's page knows it by its first words."""
    both = ((needed, "are needed"), (free, "are free"))
    sizes = [f"{size / 1e9:.2f} GB {verb}" for size, verb in both if size is not None]
    numbers = f" ({', '.join(sizes)})" if sizes else ""
    settings = f" Try {'; or '.join(advice)}." if advice else ""
    return OutOfMemory(
        f"CUDA out of memory {what}{numbers}, even after everything else was unloaded and with the smallest "
        f"plan.{settings}"
    )


def recovering(
    attempt: Callable[[], T],
    smaller: Callable[[], T],
    *,
    what: str,
    free: Callable[[], None],
    explain: Callable[[], OutOfMemory],
    is_shortage: Callable[[BaseException], bool] = is_out_of_memory,
) -> T:
    """``attempt()``; if memory runs out ``smaller()``, once; if that does too, ``explain()``'s error.

    ``free()`` runs between them, after the handler: while an exception is handled, its traceback keeps the
    tensors of every frame that it left. ``what`` is for the log: "while decoding".
    """
    result, reason = _tried(attempt, is_shortage)
    if reason is None:
        return result  # type: ignore[return-value]
    log.warning(
        "Out of memory %s (%s): everything else is unloaded, and it is tried once more with less.",
        what,
        reason,
    )
    gc.collect()
    free()
    result, reason = _tried(smaller, is_shortage)
    if reason is None:
        return result  # type: ignore[return-value]
    gc.collect()
    free()
    raise explain()


def _tried(
    call: Callable[[], T], is_shortage: Callable[[BaseException], bool]
) -> tuple[T | None, str | None]:
    """The result, and no reason; or nothing, and what the allocator said in its first sentences."""
    try:
        return call(), None
    except Exception as error:
        if not is_shortage(error):
            raise
        return None, ". ".join(str(error).split(". ")[:2]).removesuffix(".")
