"""Writers of LoRAs in every spelling and of every kind, and what each makes of a weight, by hand in fp64.

Independent of lens_core: formulas are written out anew, each from its trainer's definition.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Size = tuple[int, int]
# A weight [N, K] in fp64 to what an adapter at full strength makes of it.
Change = Callable[[Tensor], Tensor]
RANK, ALPHA = 4, 2.0
SCALE = ALPHA / RANK

DOTS, LINES = "{dots}", "{lines}"
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
A_B = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Spelling:
    """How a program names a layer's tensors: what is before the suffix, the suffixes of a LoRA's two
    matrices, and where alpha is: in a tensor, in the metadata, or nowhere (then it is the rank)."""

    layer: str
    down_up: tuple[str, str] = A_B
    alpha_tensor: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return SCALE if self.alpha_tensor or self.metadata else 1.0

    def key(self, layer: str) -> str:
        return self.layer.format(dots=layer, lines=layer.replace(".", "_"))


def adapter_config(prefix: str = "", **settings: Any) -> dict[str, str]:
    """What diffusers writes beside a LoRA: PEFT's config as JSON."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": False, **settings}
    return {"lora_adapter_metadata": json.dumps({prefix + name: value for name, value in config.items()})}


SPELLINGS: dict[str, Spelling] = {
    "sd-scripts": Spelling("lora_unet_" + LINES, DOWN_UP, alpha_tensor=True),
    "VideoX-Fun": Spelling("lora_unet__" + LINES, DOWN_UP, alpha_tensor=True),
    "kohya, of a diffusers model": Spelling("lora_transformer_" + LINES, DOWN_UP, alpha_tensor=True),
    "LyCORIS": Spelling("lycoris_" + LINES, DOWN_UP, alpha_tensor=True),
    "OneTrainer": Spelling("transformer." + DOTS, DOWN_UP, alpha_tensor=True),
    "ComfyUI": Spelling("diffusion_model." + DOTS),
    "LoboForge": Spelling(
        "diffusion_model." + DOTS,
        (".lora_A.default.weight", ".lora_B.default.weight"),
        metadata={"base_model": "Lens-Base", "step": "100", "rank": str(RANK), "alpha": "2"},
    ),
    "SceneWorks": Spelling(DOTS, metadata=adapter_config()),
    "diffusers": Spelling("transformer." + DOTS, metadata=adapter_config("transformer.")),
    "diffusers before PEFT": Spelling("transformer." + DOTS, (".lora.down.weight", ".lora.up.weight")),
    "diffusers' first": Spelling("transformer." + DOTS, ("_lora.down.weight", "_lora.up.weight")),
    "linear layer": Spelling(DOTS, (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    "no suffix": Spelling("diffusion_model." + DOTS, (".lora_A", ".lora_B")),
    "PEFT": Spelling("base_model.model." + DOTS),
    "PEFT of a pipeline": Spelling("base_model.model.transformer." + DOTS),
    "whole checkpoint": Spelling("model.diffusion_model." + DOTS, alpha_tensor=True),
}
# One of each way to write a layer's name, for kinds whose suffixes all programs share.
PREFIXES = ("sd-scripts", "VideoX-Fun", "kohya, of a diffusers model", "LyCORIS", "OneTrainer", "ComfyUI",
            "SceneWorks", "PEFT of a pipeline")  # fmt: skip


@dataclass
class Adapter:
    """A layer's tensors by the adapters' own suffixes, alpha aside, and what they make of its weight, given
    the scale that the file tells."""

    tensors: dict[str, Tensor]
    change: Callable[[Tensor, float], Tensor]


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def lora(g: torch.Generator, size: Size) -> Adapter:
    up, down = _random(g, size[0], RANK), _random(g, RANK, size[1]) / size[1] ** 0.5
    tensors = {"lora_up.weight": up, "lora_down.weight": down}
    return Adapter(tensors, lambda w, s: w + s * (up.double() @ down.double()))


def lora_mid(g: torch.Generator, size: Size) -> Adapter:
    """LyCORIS' Tucker form, as 1 x 1 convolutions are written."""
    plain = lora(g, size).tensors
    up, down, mid = plain["lora_up.weight"], plain["lora_down.weight"], _random(g, RANK, RANK)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid[:, :, None, None]}
    return Adapter(tensors, lambda w, s: w + s * (up.double() @ mid.double() @ down.double()))


def loha(g: torch.Generator, size: Size) -> Adapter:
    a, c = _random(g, size[0], RANK), _random(g, size[0], RANK)
    b, d = _random(g, RANK, size[1]) / size[1] ** 0.5, _random(g, RANK, size[1])
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    return Adapter(tensors, lambda w, s: w + s * (a.double() @ b.double()) * (c.double() @ d.double()))


def loha_tucker(g: torch.Generator, size: Size) -> Adapter:
    """With cores t1 and t2, each first factor lying on its side."""
    tensors, products = {}, []
    for number in "12":
        a, b = _random(g, RANK, size[0]), _random(g, RANK, size[1]) / size[1] ** 0.5
        core = _random(g, RANK, RANK)
        tensors |= {f"hada_w{number}_a": a, f"hada_w{number}_b": b, f"hada_t{number}": core[:, :, None, None]}
        products.append(torch.einsum("ij,jr,ip->pr", core.double(), b.double(), a.double()))
    return Adapter(tensors, lambda w, s: w + s * products[0] * products[1])


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("ab,cd->acbd", left.double(), right.double()).reshape(
        left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
    )


def lokr(g: torch.Generator, size: Size, whole: str = "1", tucker: bool = False) -> Adapter:
    """``whole``: which factors are no product. Of a size without small divisors one is a single number."""
    rows, columns = (next(n for n in (4, 3, 2, 11, 1) if length % n == 0) for length in size)
    sizes = {"1": (rows, columns), "2": (size[0] // rows, size[1] // columns)}
    tensors: dict[str, Tensor] = {}
    factors = []
    for number, (height, width) in sizes.items():
        name = f"lokr_w{number}"
        a, b = _random(g, height, RANK), _random(g, RANK, width) / size[1] ** 0.5
        if number in whole:
            tensors[name] = a @ b
            factors.append(tensors[name].double())
        elif tucker and number == "2":
            core = _random(g, RANK, RANK)
            tensors |= {f"{name}_a": a.T.contiguous(), f"{name}_b": b, "lokr_t2": core[:, :, None, None]}
            factors.append(a.double() @ core.double() @ b.double())
        else:
            tensors |= {f"{name}_a": a, f"{name}_b": b}
            factors.append(a.double() @ b.double())
    scaled = set(whole) != {"1", "2"}
    return Adapter(tensors, lambda w, s: w + (s if scaled else 1.0) * _kronecker(*factors))


def dora(g: torch.Generator, size: Size, axis: int) -> Adapter:
    """A LoRA with a magnitude for each output (``axis`` 1) or input (0)."""
    plain = lora(g, size)
    shape = (size[0], 1) if axis == 1 else (1, size[1])
    magnitude = 0.5 + torch.rand(shape, generator=g)

    def change(w: Tensor, s: float) -> Tensor:
        v = plain.change(w, s)
        return magnitude.double() * v / v.square().sum(axis, keepdim=True).sqrt()

    return Adapter({**plain.tensors, "dora_scale": magnitude}, change)


def oft(g: torch.Generator, size: Size) -> Adapter:
    """LyCORIS' Diag-OFT with a rescale; (I + Q)(I - Q)^-1, transposed, on each block of outputs."""
    block = next(n for n in (4, 11, 1) if size[0] % n == 0)
    blocks = 0.1 * _random(g, size[0] // block, block, block)
    rescale = 0.5 + torch.rand(size[0], 1, generator=g)
    skew = torch.block_diag(*(blocks - blocks.transpose(1, 2)).double())
    one = torch.eye(size[0], dtype=torch.float64)
    turn = (one + skew) @ torch.linalg.inv(one - skew)
    return Adapter({"oft_blocks": blocks, "rescale": rescale}, lambda w, s: rescale.double() * (turn.T @ w))


def oft_inputs(g: torch.Generator, size: Size) -> Adapter:
    """PEFT's and OneTrainer's: inputs x R, so W R^T, with R = 1 + 2 Q + 2 Q^2 + 2 Q^3 + Q^4."""
    block = next(n for n in (8, 11) if size[1] % n == 0)
    above = 0.1 * _random(g, size[1] // block, block * (block - 1) // 2)
    rows, columns = torch.triu_indices(block, block, 1)
    q = torch.zeros(size[1] // block, block, block, dtype=torch.float64)
    q[:, rows, columns] = above.double()
    q = q - q.transpose(1, 2)
    series = torch.eye(block, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    return Adapter({"oft_R.weight": above}, lambda w, s: w @ torch.block_diag(*series).T)


def diff(g: torch.Generator, size: Size) -> Adapter:
    change = _random(g, *size) / size[1] ** 0.5
    return Adapter({"diff": change}, lambda w, s: w + change.double())


KINDS: dict[str, Callable[[torch.Generator, Size], Adapter]] = {
    "LoRA": lora,
    "LoRA, Tucker": lora_mid,
    "LoHa": loha,
    "LoHa, Tucker": loha_tucker,
    "LoKr": lokr,
    "LoKr, both products": lambda g, size: lokr(g, size, whole=""),
    "LoKr, both whole": lambda g, size: lokr(g, size, whole="12"),
    "LoKr, Tucker": lambda g, size: lokr(g, size, tucker=True),
    "DoRA by output": lambda g, size: dora(g, size, 1),
    "DoRA by input": lambda g, size: dora(g, size, 0),
    "OFT": oft,
    "OFT of inputs": oft_inputs,
    "full weights": diff,
}


def write(
    path: Path,
    sizes: Mapping[str, Size],
    kind: str = "LoRA",
    spelling: str = "ComfyUI",
    *,
    which: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    more: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Change]:
    """Write an adapter of ``kind`` for the layers of ``which`` (None: all); returns what it makes of each
    layer's weight. ``metadata`` takes the place of the spelling's, ``more`` are further tensors."""
    how, generator = SPELLINGS[spelling], torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = dict(more or {})
    changes: dict[str, Change] = {}
    for layer in sizes if which is None else which:
        adapter = KINDS[kind](generator, sizes[layer])
        rounded = {name: tensor.to(dtype) for name, tensor in adapter.tensors.items()}
        for name, tensor in rounded.items():
            stored[how.key(layer) + _suffix(name, how)] = tensor
        alpha = how.alpha_tensor and not kind.startswith("OFT")
        if alpha:
            stored[how.key(layer) + ".alpha"] = torch.tensor(ALPHA)
        scale = 1.0 if kind.startswith("OFT") else how.scale
        changes[layer] = lambda w, make=adapter.change, scale=scale: make(w.double(), scale)
    stored = {key: tensor.clone() for key, tensor in stored.items()}
    save_file(stored, path, dict(how.metadata if metadata is None else metadata))
    return changes


def _suffix(name: str, how: Spelling) -> str:
    down, up = how.down_up
    return {"lora_down.weight": down, "lora_up.weight": up}.get(name, f".{name}")
