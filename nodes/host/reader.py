"""ComfyUI's own file reader for checkpoints that lens_core has opened."""

from __future__ import annotations

from collections.abc import Callable

import comfy.utils
from torch import Tensor

from ...lens_core.weights.loader import AnyCheckpoint


def host_reader(checkpoint: AnyCheckpoint) -> Callable[[str], Tensor]:
    """Read tensors with ComfyUI's loader: with dynamic VRAM they then stream from the file.

    It opens files by their ending and would unpickle others, so those are read by ours.
    """
    if any(path.suffix.lower() not in (".safetensors", ".sft") for path in checkpoint.paths):
        return checkpoint.read
    files = {path: comfy.utils.load_torch_file(str(path)) for path in checkpoint.paths}
    return lambda name: files[checkpoint.header[name].path][name]
