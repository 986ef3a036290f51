"""Model files: what each is, whether it could be loaded, and on demand its hash and whether its numbers are.

Without ``hash`` and ``values`` headers alone are read, so a whole models folder takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..digest import sha256
from ..errors import LensError, first_of
from ..loading import SUBFOLDERS, check_component
from ..sources import Published, known
from ..weights import Kind, inspect
from ..weights.gguf import GgufCheckpoint
from ..weights.kind import open_part
from ..weights.loader import AnyCheckpoint
from ..weights.opening import is_shard
from ..weights.tensor_info import DTYPES, TensorInfo
from .report import Finding, OnProgress, sentence

COMPONENTS = tuple(SUBFOLDERS)
_SUFFIXES = (".safetensors", ".sft", ".gguf")
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Item:
    """A file, or a folder that holds one component; whether the user named it himself, and wants folders
    shown."""

    path: Path
    named: bool = True
    whole: bool = False

    @property
    def label(self) -> str:
        """How to speak of it: without the folders above, but for the model that a component is of.

        The home folder's name is its owner's.
        """
        if self.whole:
            return str(self.path)
        home, names = Path.home(), [self.path]
        if self.path.name in SUBFOLDERS.values():
            names.insert(0, self.path.parent)
        return "/".join("~" if path == home else path.name for path in names)


@dataclass
class Files:
    """What was found: lines of the report, and the sound components as (kind, path)."""

    findings: list[Finding] = field(default_factory=list)
    components: list[tuple[Kind, Item]] = field(default_factory=list)
    others: int = 0
    loras: int = 0


def find(paths: Sequence[Path], whole: bool = False) -> list[Item]:
    """What is to be looked at: the files named, and in folders those that a loader could take; each once."""
    items: list[Item] = []
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            items += [Item(found, False, whole) for found in _within(path, seen)]
        else:
            items.append(Item(path, True, whole))
    return items


def _within(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Files and components' folders below ``folder``, in the order of their names."""
    real = folder.resolve()
    if real in seen:  # named twice, or a link to a folder above
        return
    seen.add(real)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.is_file()]
    weights = [path for path in files if path.name.lower().endswith(_SUFFIXES)]
    shards = [path for path in weights if is_shard(path.name)]
    joined = shards or any(path.name.endswith(".safetensors.index.json") for path in files)
    described = len(weights) == 1 and any(path.name == "config.json" for path in files)
    if joined or described:
        yield folder
    yield from () if described else (path for path in weights if path not in shards)
    for path in entries:
        if path.is_dir():
            yield from _within(path, seen)


def examine(
    item: Item,
    into: Files,
    *,
    hashes: bool = False,
    values: bool = False,
    tokenizer_places: Sequence[Path] = (),
    on_progress: OnProgress,
) -> None:
    """Look at one item and write down what was found. Only ``on_progress`` may stop it."""
    try:
        kinds = inspect(item.path)
    except (LensError, OSError) as error:
        into.findings.append(Finding(item.label, sentence(error), broken=True))
        return
    if not item.named and all(kind.component not in COMPONENTS for kind in kinds):
        into.loras += kinds[0].component == "lora"
        into.others += kinds[0].component != "lora"
        return
    for kind in kinds:
        finding = _component(item, kind, values, tokenizer_places, on_progress)
        into.findings.append(finding)
        if kind.component in COMPONENTS and not finding.broken:
            into.components.append((kind, item))
    if hashes:
        files = dict.fromkeys(path for kind in kinds for path in kind.paths)
        into.findings += [hashed(path, on_progress) for path in files]


def _component(
    item: Item, kind: Kind, values: bool, tokenizer_places: Sequence[Path], on_progress: OnProgress
) -> Finding:
    """One component of an item: what it is, and whether it could be loaded."""
    size = sum(path.stat().st_size for path in kind.paths)
    variant = None if kind.variant is None else kind.variant.name
    words = [kind.what, variant, kind.quantisation, kind.layout, f"{size:,} bytes"]
    text = ", ".join(word for word in words if word)
    facts: dict[str, Any] = {
        "component": kind.component,
        "variant": variant,
        "quantisation": kind.quantisation,
        "layout": kind.layout,
        "size": size,
    }
    if kind.component not in COMPONENTS:
        return Finding(item.label, f"{text}: {_use(kind)}", facts=facts)
    try:
        check_component(item.path, kind.component, tokenizer_places)
        if not values:
            return Finding(item.label, f"ok: {text}", facts=facts)
        fault, note = unsound(open_part(item.path, kind.component), item.label, on_progress)
    except (LensError, OSError) as error:
        return Finding(item.label, f"{text}: {sentence(error)}", broken=True, facts=facts)
    said = fault or f"all numbers finite{note}"
    return Finding(item.label, f"{'' if fault else 'ok: '}{text}; {said}", fault != "", facts)


def _use(kind: Kind) -> str:
    return "for LensLoraLoader" if kind.component == "lora" else "no part of Lens"


def unsound(checkpoint: AnyCheckpoint, label: str, on_progress: OnProgress) -> tuple[str, str]:
    """Read every number: what is wrong ("": nothing), and what is merely odd ("": nothing)."""
    infos = sorted(checkpoint.header.items(), key=lambda entry: (str(entry[1].path), entry[1].offset))
    total, done = sum(info.nbytes for _, info in infos), 0
    infinite, zero = [], []
    for name, info in infos:
        sound, other = True, False
        for start, piece in _pieces(checkpoint, name, info):
            on_progress(f"Reading {label}", done + start, total)
            sound = sound and bool(torch.isfinite(piece).all())
            other = other or bool(piece.any())
        done += info.nbytes
        if not sound:
            infinite.append(name)
        elif not other and 0 not in info.shape:
            zero.append(name)
    fault = f"NaN or infinite numbers in {_some(infinite)}. Download the file again." if infinite else ""
    return fault, f"; nothing but zeros in {_some(zero)}" if zero else ""


def _some(names: list[str]) -> str:
    return f"{len(names)} of its tensors ({first_of(names, 3)})"


def _pieces(checkpoint: AnyCheckpoint, name: str, info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
    """Bytes before it and numbers of each piece of a tensor; none of a type that only its loader knows."""
    rows = max(info.shape[0] if info.shape else 1, 1)
    for start, stop in info.pieces():
        before = info.nbytes // rows * start
        if info.dtype in DTYPES:
            numbers = info.values(start, stop)
            yield before, numbers.float() if numbers.dtype in _EIGHT_BITS else numbers
        elif isinstance(checkpoint, GgufCheckpoint):
            yield before, _dequantised(checkpoint, name, info, start, stop)


def _dequantised(checkpoint: GgufCheckpoint, name: str, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows of a GGUF's packed tensor: it is read as if they were all there is."""
    if len(info.shape) < 2:
        return checkpoint.read(name, torch.float32)
    row = info.nbytes // info.shape[0]
    shape = (stop - start, *info.shape[1:])
    part = copy(checkpoint)
    part.header = {
        name: replace(info, shape=shape, offset=info.offset + start * row, nbytes=(stop - start) * row)
    }
    return part.read(name, torch.float32)


def hashed(path: Path, on_progress: OnProgress) -> Finding:
    """A file's SHA-256 beside the published one."""
    published = known(path.as_posix()) or Published()
    try:
        digest = sha256(path, partial(on_progress, f"Hashing {path.name}"))
    except OSError as error:
        return Finding(path.name, sentence(error), broken=True)
    facts = {"sha256": digest, "published": published.sha256}
    if published.sha256 is None:
        return Finding(path.name, f"SHA-256 {digest}; none is published that could be compared", facts=facts)
    if digest == published.sha256:
        return Finding(path.name, f"SHA-256 {digest}, as published", facts=facts)
    text = f"SHA-256 {digest}, but published is {published.sha256}: damaged, or another file of that name. "
    return Finding(path.name, text + "Download it again if it should be the published one.", True, facts)
