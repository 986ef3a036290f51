"""The node's progress bar, and Cancel, for work that ComfyUI does not step through itself."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils
from server import PromptServer


def on_progress() -> Callable[[int, int], None]:
    """A callback (done, total) that moves the running node's bar and raises if the user cancelled."""
    bar = comfy.utils.ProgressBar(1)

    def update(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return update


def say(text: str, node_id: str | None) -> None:
    """Show a line of text on a node of the page, if there are a page and a text."""
    server = getattr(PromptServer, "instance", None)
    if text and node_id is not None and server is not None:
        server.send_progress_text(text, node_id)
