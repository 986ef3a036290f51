"""The node's progress bar, its line of text, and Cancel, for work that ComfyUI does not step through itself.

A node that wants its work told in words runs it within ``telling``; the work says what it does by ``tell``,
or through ``on_progress``, without knowing for which node. In other packs' nodes nothing is said: the last
line would stay there.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate

import comfy.model_management
import comfy.utils
from server import PromptServer

from ...lens_core.weights.loader import AnyCheckpoint

# Seconds from one line to the next at least.
_PAUSE = 0.25
# (done, total) in words.
Words = Callable[[int, int], str]


class Lines:
    """Of one node's run: those that come too soon after another are left out. ``told``: whether any came."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.strips, self.told = 0, False
        self._last = float("-inf")

    def tell(self, text: str) -> None:
        """Show a line, if the one before is old enough."""
        now = time.monotonic()
        if now - self._last >= _PAUSE:
            self._last, self.told = now, True
            say(text, self.node_id)


_lines: ContextVar[Lines | None] = ContextVar("lens_lines", default=None)


@contextmanager
def telling(node_id: str | None) -> Iterator[Lines]:
    """Meanwhile what is done is told on this node."""
    lines = Lines(node_id)
    before = _lines.set(lines)
    try:
        yield lines
    finally:
        _lines.reset(before)


def tell(text: str) -> None:
    """Show a passing line on the node that runs, if it wants any and the one before is old enough."""
    lines = _lines.get()
    if lines is not None:
        lines.tell(text)


def on_strip() -> None:
    """Between strips of a picture in the VAE: tells how many there were, and raises if the user cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    lines = _lines.get()
    if lines is not None:
        lines.strips += 1
        lines.tell(f"Decoding: strip {lines.strips}")


def on_progress(words: Words | None = None) -> Callable[[int, int], None]:
    """A callback (done, total) that moves the running node's bar, tells it in ``words`` and raises if the
    user cancelled."""
    bar = comfy.utils.ProgressBar(1)

    def update(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)
        if words is not None:
            tell(words(done, total))

    return update


def loading(checkpoint: AnyCheckpoint) -> Words:
    """Words for tensors that are read from it in the order of its files."""
    counts = Counter(str(info.path) for info in checkpoint.header.values())
    ends = list(accumulate(counts[path] for path in sorted(counts)))

    def words(done: int, total: int) -> str:
        if len(ends) < 2:
            return f"Loading, {100 * done // max(total, 1)} %"
        shard = bisect_left(ends, done / max(total, 1) * ends[-1]) + 1
        return f"Loading {min(shard, len(ends))}/{len(ends)} shards"

    return words


def say(text: str, node_id: str | None) -> None:
    """Show a line of text on a node of the page, if there are a page and a text."""
    server = getattr(PromptServer, "instance", None)
    if text and node_id is not None and server is not None:
        server.send_progress_text(text, node_id)


def size_in_words(size: int) -> str:
    """Of ``size`` bytes of weights: Lens has gigabytes, nano Lens megabytes."""
    return f"{size / 1e6:.0f} MB" if size < 5e7 else f"{size / 1e9:.1f} GB"
