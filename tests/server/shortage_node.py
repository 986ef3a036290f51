"""A node for the tests' server, copied into its custom_nodes: memory runs out in calls of the pack's."""

import sys
from typing import Any

import torch


class Shortage:
    """Makes ``place`` (module:class:method) fail the next ``times`` calls; 0: as it was."""

    RETURN_TYPES: tuple = ()
    FUNCTION, OUTPUT_NODE, CATEGORY = "run", True, "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"place": ("STRING",), "times": ("INT",)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802
        return float("nan")

    def run(self, place: str, times: int) -> dict[str, Any]:
        """Replace the method of the class that the server's own copy of the pack uses."""
        module, name, method = place.split(":")
        (found,) = (m for n, m in list(sys.modules.items()) if n.endswith(f"ComfyUI-Lens.{module}"))
        owner = getattr(found, name)
        original = getattr(getattr(owner, method), "original", getattr(owner, method))
        left = [times]

        def short(*args: Any, **kwargs: Any) -> Any:
            if left[0] > 0:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(*args, **kwargs)

        short.original = original
        setattr(owner, method, short if times else original)
        return {}


NODE_CLASS_MAPPINGS = {"Shortage": Shortage}
