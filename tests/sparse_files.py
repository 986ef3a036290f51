"""Files of full size that take no room: a real header, and tensors that were never written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}


def write_sparse(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A safetensors file with the names, dtypes and shapes of ``tensors``, meta ones as well."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        span = [end, end + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        end = span[1]
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return path
