"""Fills a module from a checkpoint, strictly: every tensor has its place, or the load fails.

Names and shapes are compared from the header alone, so a wrong file costs no time and no memory.
Tensors already in the wanted dtype stay where the file is mapped; others are converted one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, CheckpointMismatch
from .keymap import Table, rename
from .reader import Checkpoint

log = logging.getLogger(__name__)
OnTensor = Callable[[int, int], None]
Shape = tuple[int, ...]


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    table: Table,
    dtype: torch.dtype | None,
    *,
    structure: nn.Module | None = None,
    unused: Iterable[str] = (),
    optional: Iterable[str] = (),
    read: Callable[[str], Tensor] | None = None,
    on_tensor: OnTensor | None = None,
) -> None:
    """Assign every tensor of ``module`` from ``checkpoint``.

    Floating tensors become ``dtype`` (None: as stored), bytes stay bytes. ``structure`` is a module
    with the same tensors to compare with, where ``module``'s own are not there yet (ComfyUI's lazy
    layers). ``unused`` are patterns of names to leave in the file, ``optional`` buffers that it may
    lack. ``read`` replaces the checkpoint's own reading (a host may have a faster one).
    ``on_tensor(done, total)`` may raise to cancel. Raises CheckpointMismatch where the tensors are
    others; every missing, unexpected and wrong-shaped one is logged.
    """
    read = checkpoint.read if read is None else read
    source = rename(checkpoint.header, table, unused)
    expected = (module if structure is None else structure).state_dict()
    want = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    _compare(want, checkpoint, source, set(optional))
    _check_kinds(expected, checkpoint, source)
    tensors = {}
    for done, (name, stored) in enumerate(source.items(), 1):
        tensor = read(stored).reshape(want[name])
        cast = dtype is not None and tensor.is_floating_point()
        tensors[name] = tensor.to(dtype) if cast else tensor
        if on_tensor is not None:
            on_tensor(done, len(source))
    for name in optional:
        tensors.setdefault(name, torch.zeros(want[name], dtype=expected[name].dtype))
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def _compare(
    want: dict[str, Shape], checkpoint: Checkpoint, source: dict[str, str], optional: set[str]
) -> None:
    got = {n: _linear_shape(want.get(n), checkpoint.header[old].shape) for n, old in source.items()}
    missing = [name for name in want if name not in got and name not in optional]
    unexpected = [source[name] for name in got if name not in want]
    shapes = [(n, want[n], got[n]) for n in got if n in want and want[n] != got[n]]
    if missing or unexpected or shapes:
        log.error("%s: missing %s; unexpected %s; shapes %s", checkpoint.name, missing, unexpected, shapes)
        raise CheckpointMismatch(checkpoint.name, missing, unexpected, shapes)


def _check_kinds(expected: dict[str, Tensor], checkpoint: Checkpoint, source: dict[str, str]) -> None:
    """Bytes where bytes belong, floating-point numbers where those do."""
    for name, stored in source.items():
        dtype = checkpoint.header[stored].dtype
        if dtype.startswith(("F", "BF")) != expected[name].is_floating_point():
            wanted = "floating-point numbers" if expected[name].is_floating_point() else "integers"
            raise CheckpointError(
                f"{checkpoint.name} stores {stored} as {dtype}; expected {wanted}. It is quantised in "
                "a way that this version does not read: choose the bf16 file."
            )


def _linear_shape(want: Shape | None, got: Shape) -> Shape:
    """A 1x1 convolution's weight stored where a linear's is wanted counts as that linear's."""
    return got[:2] if want is not None and len(want) == 2 and got[2:] == (1, 1) else got
