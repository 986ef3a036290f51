"""Kinds of adapters by the tensors that a layer has: which, for a weight of which size, of which rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Shape = tuple[int, ...]


class Kind(NamedTuple):
    """What a layer's tensors are: ``size`` (rows, columns) of the weight that they fit, 0 where any do, and
    of how many columns there must be a multiple."""

    name: str
    size: tuple[int, int]
    rank: int | None = None
    block: int = 1


def kind_of(shapes: Mapping[str, Shape]) -> Kind | None:
    """The kind of a layer's tensors by their names and shapes; None where they make none."""
    try:
        kind = _kind(shapes)
    except (IndexError, KeyError, ValueError):  # a tensor is not there, or not a matrix
        return None
    if kind is not None and "dora_scale" in shapes:
        name = "DoRA" if kind.name == "LoRA" else f"{kind.name} with DoRA"
        return kind._replace(name=name) if kind.name in ("LoRA", "LoHa", "LoKr", "OFT") else None
    return kind


def _kind(shapes: Mapping[str, Shape]) -> Kind | None:
    names = set(shapes)
    if names & {"lora_up.weight", "lora_down.weight"}:
        return _lora(shapes)
    if any(name.startswith("hada_") for name in names):
        return _loha(shapes)
    if any(name.startswith("lokr_") for name in names):
        return _lokr(shapes)
    if "oft_blocks" in names:
        count, size, other = shapes["oft_blocks"]
        return Kind("OFT", (count * size, 0)) if size == other and count * size else None
    if "oft_R.weight" in names:
        count, elements = shapes["oft_R.weight"]
        size = block_size(elements)
        # One block alone is shared by all inputs.
        return Kind("OFT", (0, count * size if count > 1 else 0), block=size) if size else None
    if "diff" in names:
        return Kind("full weights", _matrix(shapes["diff"]))
    if "diff_b" in names:
        return Kind("biases", (shapes["diff_b"][0], 0))
    return None


def block_size(elements: int) -> int:
    """Side of a skew-symmetric matrix with this many numbers above its diagonal; 0 where there is none."""
    size = round((2 * elements + 0.25) ** 0.5 + 0.5)
    return size if size * (size - 1) // 2 == elements and elements > 0 else 0


def _lora(shapes: Mapping[str, Shape]) -> Kind | None:
    rows, rank = _matrix(shapes["lora_up.weight"])
    inner, columns = _matrix(shapes["lora_down.weight"])
    middle = _matrix(shapes.get("lora_mid.weight", (rank, inner)))
    fits = middle == (rank, inner) and rank == inner > 0
    return Kind("LoRA", (rows, columns), inner) if fits else None


def _loha(shapes: Mapping[str, Shape]) -> Kind | None:
    first = _product(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
    second = _product(shapes, "hada_w2_a", "hada_w2_b", "hada_t2")
    if first is None or second is None or first[0] != second[0]:
        return None
    return Kind("LoHa", first[0], first[1])


def _lokr(shapes: Mapping[str, Shape]) -> Kind | None:
    factors: list[tuple[tuple[int, int], int | None] | None] = []
    for number in "12":
        whole = shapes.get(f"lokr_w{number}")
        names = f"lokr_w{number}_a", f"lokr_w{number}_b", f"lokr_t{number}"
        factors.append((_matrix(whole), None) if whole is not None else _product(shapes, *names))
    left, right = factors
    if left is None or right is None:
        return None
    size = left[0][0] * right[0][0], left[0][1] * right[0][1]
    return Kind("LoKr", size, right[1] if right[1] is not None else left[1])


def _product(shapes: Mapping[str, Shape], a: str, b: str, core: str) -> tuple[tuple[int, int], int] | None:
    """Size and rank of a @ b, or of a Tucker product around ``core``, where a lies the other way round."""
    rows, rank = _matrix(shapes[a])
    inner, columns = _matrix(shapes[b])
    if core in shapes:
        rows, rank = rank, rows
        if _matrix(shapes[core]) != (rank, inner):
            return None
    elif rank != inner:
        return None
    return ((rows, columns), inner) if inner else None


def _matrix(shape: Shape) -> tuple[int, int]:
    """[rows, columns], also of a 1 x 1 convolution; IndexError for others."""
    if len(shape) not in (2, 4) or set(shape[2:]) - {1}:
        raise IndexError(shape)
    return shape[0], shape[1]
