"""Fills a module from a checkpoint, strictly: every tensor has its place, or the load fails.

Names, shapes and kinds are compared from the header alone, so a wrong file costs no time and no
memory. Tensors that need no conversion stay where the file is mapped; others are made one part at a
time, and what they were made from is let go at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, CheckpointMismatch
from .gguf import GgufCheckpoint
from .keymap import Table, rename
from .reader import Checkpoint
from .tensor_info import TensorInfo

log = logging.getLogger(__name__)
OnTensor = Callable[[int, int], None]
Shape = tuple[int, ...]
AnyCheckpoint = Checkpoint | GgufCheckpoint
# Stands in ``Stored.dtypes`` for every dtype of floating-point numbers, or of integers.
FLOATS, INTEGERS = ("floating-point numbers",), ("integers",)


@dataclass(frozen=True)
class Stored:
    """A tensor that a file must have: its name after renaming, the shapes that it may have (none:
    any), and the dtypes."""

    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = FLOATS

    def accepts(self, info: TensorInfo) -> bool:
        """Whether the stored dtype is one that this tensor may have."""
        if self.dtypes in (FLOATS, INTEGERS):
            return info.floating == (self.dtypes == FLOATS)
        return info.dtype in self.dtypes


@dataclass(frozen=True)
class Source:
    """A stored tensor as a conversion gets it: in pieces through ``info``, or whole through ``read``
    (dtype or None for as stored)."""

    info: TensorInfo
    read: Callable[[torch.dtype | None], Tensor]


# The stored tensors and the dtype of floating-point ones -> the module's tensors, as ``targets``.
Make = Callable[[Sequence[Source], "torch.dtype | None"], Sequence[Tensor]]


@dataclass(frozen=True)
class Part:
    """Tensors of a module, and the stored ones that they are made from."""

    stored: tuple[Stored, ...]
    targets: tuple[str, ...]
    make: Make


@dataclass(frozen=True)
class Plan:
    """What goes where: each part with the names of its tensors in the file."""

    steps: tuple[tuple[Part, tuple[str, ...]], ...]
    total: int
    shapes: dict[str, Shape]


def load_into(
    module: nn.Module,
    checkpoint: AnyCheckpoint,
    table: Table,
    dtype: torch.dtype | None,
    *,
    structure: nn.Module | None = None,
    unused: Iterable[str] = (),
    optional: Iterable[str] = (),
    parts: Iterable[Part] = (),
    read: Callable[[str], Tensor] | None = None,
    on_tensor: OnTensor | None = None,
) -> None:
    """Assign every tensor of ``module`` from ``checkpoint``.

    Floating tensors become ``dtype`` (None: as stored), bytes stay bytes. ``structure`` is a module
    with the same tensors to compare with, where ``module``'s own are not there yet (ComfyUI's lazy
    layers). ``unused`` are patterns of names to leave in the file, ``optional`` buffers that it may
    lack; ``parts`` make tensors by more than a rename. ``read`` replaces the checkpoint's own
    reading (a host may have a faster one). ``on_tensor(done, total)`` may raise to cancel. Raises
    CheckpointMismatch where the tensors are others; every missing, unexpected and wrong-shaped one
    is logged.
    """
    optional = set(optional)
    structure = module if structure is None else structure
    plan = plan_load(structure, checkpoint, table, unused=unused, optional=optional, parts=parts)
    tensors: dict[str, Tensor] = {}
    done = 0
    for part, names in plan.steps:
        sources = [_source(checkpoint, name, read) for name in names]
        made = part.make(sources, dtype)
        for target, tensor in zip(part.targets, made, strict=True):
            tensors[target] = tensor.reshape(plan.shapes[target])
        done += len(names)
        if on_tensor is not None:
            on_tensor(done, plan.total)
    expected = structure.state_dict()
    for name in optional:
        tensors.setdefault(name, torch.zeros(plan.shapes[name], dtype=expected[name].dtype))
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def plan_load(
    structure: nn.Module,
    checkpoint: AnyCheckpoint,
    table: Table,
    *,
    unused: Iterable[str] = (),
    optional: Iterable[str] = (),
    parts: Iterable[Part] = (),
) -> Plan:
    """Find every tensor of ``structure`` in the header, or raise; parameters as in ``load_into``."""
    source = rename(checkpoint.header, table, unused, file=checkpoint.name)
    expected = structure.state_dict()
    parts, optional = tuple(parts), set(optional)
    made = {target for part in parts for target in part.targets}
    whole = (*parts, *(_as_stored(name, tensor) for name, tensor in expected.items() if name not in made))
    _compare(whole, checkpoint, source, optional)
    _check_kinds(whole, checkpoint, source)
    steps = [
        (part, tuple(source[stored.name] for stored in part.stored))
        for part in whole
        if all(stored.name in source for stored in part.stored)
    ]
    # In the order of the file, which a disk reads fastest.
    steps.sort(
        key=lambda step: (str(checkpoint.header[step[1][0]].path), checkpoint.header[step[1][0]].offset)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return Plan(tuple(steps), len(source), shapes)


def _as_stored(name: str, tensor: Tensor) -> Part:
    """A 1x1 convolution's weight stored where a linear's is wanted counts as that linear's."""
    shape = tuple(tensor.shape)
    shapes = (shape, (*shape, 1, 1)) if len(shape) == 2 else (shape,)
    kinds = FLOATS if tensor.is_floating_point() else INTEGERS
    return Part((Stored(name, shapes, kinds),), (name,), lambda sources, dtype: [sources[0].read(dtype)])


def _source(checkpoint: AnyCheckpoint, name: str, read: Callable[[str], Tensor] | None) -> Source:
    info = checkpoint.header[name]

    def whole(dtype: torch.dtype | None) -> Tensor:
        if read is None:
            return checkpoint.read(name, dtype)
        tensor = read(name)
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    return Source(info, whole)


def _compare(
    parts: Iterable[Part], checkpoint: AnyCheckpoint, source: dict[str, str], optional: set[str]
) -> None:
    want = {stored.name: stored for part in parts for stored in part.stored}
    got = {name: checkpoint.header[old].shape for name, old in source.items()}
    missing = [name for name in want if name not in got and name not in optional]
    unexpected = [source[name] for name in got if name not in want]
    shapes = [
        (name, want[name].shapes[0], shape)
        for name, shape in got.items()
        if name in want and want[name].shapes and shape not in want[name].shapes
    ]
    if missing or unexpected or shapes:
        log.error("%s: missing %s; unexpected %s; shapes %s", checkpoint.name, missing, unexpected, shapes)
        raise CheckpointMismatch(checkpoint.name, missing, unexpected, shapes)


def _check_kinds(parts: Iterable[Part], checkpoint: AnyCheckpoint, source: dict[str, str]) -> None:
    """Bytes where bytes belong, floating-point numbers where those do."""
    for stored in (stored for part in parts for stored in part.stored if stored.name in source):
        info = checkpoint.header[source[stored.name]]
        if not stored.accepts(info):
            wanted = " or ".join(stored.dtypes)
            raise CheckpointError(
                f"{checkpoint.name} stores {source[stored.name]} as {info.dtype}; expected {wanted}. It "
                "is quantised in a way that this version does not read: choose another file, such as "
                "the one that was published."
            )
