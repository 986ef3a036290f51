"""One quantised linear of a file, and what its readers look up: which tensors there are, how large it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant.layer_format import to_json
from ..quant.linear import Packed
from ..quantized import tensors_of
from .loader import AnyCheckpoint, Part, Shape, Source, Stored
from .tensor_info import TensorInfo

# Of scales and zero points that are no bytes.
NUMBERS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class QuantizedPart:
    """One linear: its packed tensors, without memory yet, and how they are made from the file's.

    ``called`` is what the format is called where the file comes from.
    """

    packed: Packed
    stored: tuple[Stored, ...]
    make: Callable[[Sequence[Source]], Packed]
    called: str

    def part(self, layer: str) -> Part:
        """As ``load_into`` wants it; the format that is written beside the weight is this one's."""

        def make(sources: Sequence[Source], dtype: torch.dtype | None) -> Sequence[Tensor]:
            packed = self.make(sources)._replace(form=self.packed.form)
            return [*tensors_of(packed).values(), to_json(packed.form)]

        names = (*tensors_of(self.packed), "comfy_quant")
        return Part(self.stored, tuple(f"{layer}.{name}" for name in names), make)

    def dynamic(self, on: bool) -> QuantizedPart:
        """The same with inputs quantised or not."""
        return replace(self, packed=self.packed._replace(form=self.packed.form.dynamic(on)))


@dataclass(frozen=True)
class Linears:
    """A file, the stored name of each of its tensors by the module's, and the linears' [N, K]."""

    checkpoint: AnyCheckpoint
    source: Mapping[str, str]
    sizes: Mapping[str, Shape]

    def having(self, tensor: str) -> list[str]:
        """The layers that have a tensor of this name, in the order of the file."""
        return [name.removesuffix(f".{tensor}") for name in self.source if name.endswith(f".{tensor}")]

    def info(self, name: str) -> TensorInfo | None:
        """What the header says of a tensor, if the file has it."""
        return self.checkpoint.header.get(self.source.get(name, ""))

    def needed(self, layer: str, tensor: str, form: str) -> TensorInfo:
        """The same, or CheckpointError: without it the layer's weight means nothing."""
        info = self.info(f"{layer}.{tensor}")
        if info is None:
            raise CheckpointError(
                f"{self.checkpoint.name} has no {layer}.{tensor}, without which a weight in {form} cannot be "
                "read. Download it again."
            )
        return info

    def size(self, layer: str) -> tuple[int, int]:
        """[N, K] of a linear, or CheckpointError."""
        if layer not in self.sizes:
            raise CheckpointError(
                f"{self.checkpoint.name} has a quantised layer {layer}, which Lens has not. Choose a file "
                "made for Lens."
            )
        rows, columns = self.sizes[layer]
        return rows, columns
