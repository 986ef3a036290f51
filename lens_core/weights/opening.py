"""Opening whatever a path leads to, by content and not by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .gguf import GgufCheckpoint, is_gguf
from .loader import AnyCheckpoint
from .reader import open_checkpoint

# Of a whole Lens folder, in diffusers' layout.
SUBFOLDERS = {"denoiser": "transformer", "encoder": "text_encoder", "vae": "vae"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


def component_path(path: str | Path, component: str) -> Path:
    """The component's own folder if ``path`` is a whole Lens folder, else ``path`` itself."""
    inside = Path(path) / SUBFOLDERS[component]
    return inside if os.path.isdir(inside) else Path(path)


def is_shard(name: str) -> bool:
    """Whether a file of that name is one of several that an index joins."""
    return _SHARD.search(name) is not None


def open_any(path: str | Path) -> AnyCheckpoint:
    """A safetensors or GGUF file, or a folder with one or with shards; raises CheckpointError."""
    path = Path(path)
    if os.path.isdir(path) and not any(path.glob("*.safetensors*")):
        found = sorted(path.glob("*.gguf"))
        path = found[0] if len(found) == 1 else path
    return GgufCheckpoint(path) if is_gguf(path) else open_checkpoint(path)
