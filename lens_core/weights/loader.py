"""Fills a module from a checkpoint, strictly: every tensor has its place, or the load fails.

Names and shapes are compared from the header alone, so a wrong file costs no time and no memory.
Tensors already in the wanted dtype stay where the file is mapped; others are converted one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import CheckpointMismatch
from .keymap import Table, rename
from .reader import Checkpoint

OnTensor = Callable[[int, int], None]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    table: Table,
    dtype: torch.dtype | None,
    *,
    unused: Iterable[str] = (),
    optional: Iterable[str] = (),
    read: Callable[[str], Tensor] | None = None,
    on_tensor: OnTensor | None = None,
) -> None:
    """Assign every tensor of ``module`` from ``checkpoint``.

    Floating tensors become ``dtype`` (None: as stored), bytes stay bytes. ``unused`` are patterns
    of names to leave in the file, ``optional`` names that the file may lack. ``read`` replaces the
    checkpoint's own reading (a host may have a faster one). ``on_tensor(done, total)`` may raise to
    cancel. Raises CheckpointMismatch with every missing, unexpected and wrong-shaped tensor.
    """
    read = checkpoint.read if read is None else read
    source = rename(checkpoint.header, table, unused)
    _compare(module, checkpoint, source, set(optional))
    total = len(source)
    for done, (name, stored) in enumerate(source.items(), 1):
        tensor = read(stored)
        if dtype is not None and tensor.dtype in _FLOATS:
            tensor = tensor.to(dtype)
        _assign(module, name, tensor)
        if on_tensor is not None:
            on_tensor(done, total)
    for name in optional:
        if name not in source:
            like = module.get_buffer(name)
            _assign(module, name, torch.zeros(like.shape, dtype=like.dtype))


def _compare(
    module: nn.Module, checkpoint: Checkpoint, source: dict[str, str], optional: set[str]
) -> None:
    want = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    got = {name: _linear_shape(want.get(name), checkpoint.header[old].shape) for name, old in source.items()}
    missing = [name for name in want if name not in got and name not in optional]
    unexpected = [source[name] for name in got if name not in want]
    shapes = [(n, want[n], got[n]) for n in got if n in want and want[n] != got[n]]
    if missing or unexpected or shapes:
        raise CheckpointMismatch(checkpoint.name, missing, unexpected, shapes)


def _linear_shape(want: tuple[int, ...] | None, got: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution's weight stored where a linear's is wanted counts as that linear's."""
    return got[:2] if want is not None and len(want) == 2 and got[2:] == (1, 1) else got


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        old = owner._parameters[leaf]
        assert old is not None
        value = tensor.reshape(old.shape)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
