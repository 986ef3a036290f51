"""One session of a real server with a quantised model: loaded, swapped, patched, evicted, loaded again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from scripts.comfy_server import ComfyServer, error_of

LORA = "session.safetensors"


def write_lora(path: Path, sizes: dict[str, tuple[int, int]], share: float, rank: int = 8) -> None:
    """A random LoRA for layers of ``sizes`` [N, K]; each change has ``share`` of the size of a weight with
    variance 1 / K."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer, (rows, columns) in sizes.items():
        down = torch.randn(rank, columns, generator=generator) * (share / (rank * columns) ** 0.5)
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = down
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)


class Session:
    """Pictures of an API prompt whose node ``model`` is a LensModelLoader and ``sampler`` a LensSampler."""

    def __init__(self, server: ComfyServer, prompt: dict[str, Any]) -> None:
        self.server, self.prompt = server, prompt

    def draw(self, mode: str, strength: float = 0, **model: Any) -> np.ndarray:
        """A picture in a mode, with the LoRA at a strength, or of another model."""
        prompt = copy.deepcopy(self.prompt)
        prompt["model"]["inputs"] |= {"quantization": mode, **model}
        if strength:
            inputs = {"model": ["model", 0], "lora_name": LORA, "strength": strength}
            prompt["lora"] = {"class_type": "LensLoraLoader", "inputs": inputs}
            prompt["sampler"]["inputs"]["model"] = ["lora", 0]
        entry = self.server.wait(self.server.queue(prompt))
        assert error_of(entry) is None, str(error_of(entry))
        (path,) = self.server.images(entry)
        return np.asarray(Image.open(path)).astype(np.int16)

    def check(self, mode: str, strengths: Sequence[float] = (0.5, 1.0)) -> list[int]:
        """The whole session in one mode; bytes of GPU memory that are free after each eviction."""
        first = self.draw(mode)
        assert first.std() > 5, "a flat picture"
        assert not np.array_equal(self.draw("none"), first), "the mode does nothing"
        assert np.array_equal(self.draw(mode), first), "another picture after a swap"
        apart = [np.abs(self.draw(mode, strength) - first).mean() for strength in strengths]
        assert apart == sorted(apart) and apart[0] > 0, f"the LoRA's strengths show as {apart}"
        assert np.array_equal(self.draw(mode), first), "the LoRA left something behind"
        free = [self.server.free()]
        assert np.array_equal(self.draw(mode), first), "another picture after an eviction"
        return [*free, self.server.free()]
