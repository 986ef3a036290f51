"""Good files as plain data, small, for the mutators to spoil. All numbers in them are zero."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from lens_core.denoiser import LensDenoiser
from lens_core.encoder import GptOssEncoder
from lens_core.tiny import models
from lens_core.tiny.tokenizer import tiny_tokenizer
from lens_core.vae import LensVAE

_ITEMSIZE = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
Shapes = Mapping[str, tuple[str, Sequence[int]]]


@dataclass(frozen=True)
class File:
    """``start``, and zeros up to ``size`` bytes."""

    start: bytes
    size: int

    @classmethod
    def of(cls, content: bytes) -> File:
        """Just these bytes."""
        return cls(content, len(content))


@dataclass(frozen=True)
class Base:
    """A safetensors file: its header and the first of its data; ``component`` is what it holds.

    ``beside`` are other files of its folder.
    """

    component: str
    header: dict[str, Any]
    data: bytes
    size: int
    beside: dict[str, bytes] = field(default_factory=dict)

    def file(self, text: bytes, length: int | None = None) -> File:
        """With another header, and another length before it than its own."""
        start = struct.pack("<Q", len(text) if length is None else length) + text + self.data
        return File(start, 8 + len(text) + self.size)

    def good(self) -> File:
        return self.file(json.dumps(self.header).encode())


def base(component: str, shapes: Shapes, contents: Mapping[str, bytes] | None = None, **more: Any) -> Base:
    """``contents`` are U8 tensors with these bytes, which come first."""
    contents = contents or {}
    wanted = {**{name: ("U8", [len(text)]) for name, text in contents.items()}, **shapes}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in wanted.items():
        end = at + _ITEMSIZE[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return Base(component, header, b"".join(contents.values()), at, **more)


def _shapes(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[str, list[int]]]:
    return {
        prefix + name: ("U8" if tensor.dtype == torch.uint8 else "BF16", list(tensor.shape))
        for name, tensor in module.state_dict().items()
    }


@cache
def tokenizer_json() -> dict[str, Any]:
    """The tiny tokenizer's."""
    return json.loads(tiny_tokenizer().to_str())


def _denoiser() -> dict[str, tuple[str, list[int]]]:
    return _shapes(LensDenoiser(replace(models.DENOISER, num_layers=1), device="meta"))


def _encoder() -> dict[str, tuple[str, list[int]]]:
    config = replace(models.encoder_config(304), num_hidden_layers=1)
    return _shapes(GptOssEncoder(config, device="meta"), "model.")


_LINEAR = "transformer_blocks.0.attn.img_qkv"


def _comfy() -> Base:
    shapes = _denoiser()
    shapes[f"{_LINEAR}.weight"] = ("F8_E4M3", shapes[f"{_LINEAR}.weight"][1])
    shapes[f"{_LINEAR}.weight_scale"] = ("F32", [])
    return base("denoiser", shapes, {f"{_LINEAR}.comfy_quant": b'{"format": "float8_e4m3fn"}'})


def _sdnq() -> Base:
    shapes = _denoiser()
    rows, columns = shapes[f"{_LINEAR}.weight"][1]
    shapes[f"{_LINEAR}.weight"] = ("U8", [rows * columns // 2])
    for name in ("scale", "zero_point"):
        shapes[f"{_LINEAR}.{name}"] = ("BF16", [rows, columns // 64, 1])
    config = {"quantization_config": {"quant_method": "sdnq", "weights_dtype": "uint4"}}
    return base("denoiser", shapes, beside={"config.json": json.dumps(config).encode()})


def _nvfp4() -> Base:
    shapes, contents = {}, {}
    for name, shape in _encoder().items():
        name = name.removeprefix("model.")
        if name.endswith("_blocks"):
            bank, (experts, rows, groups, _) = name.removesuffix("_blocks"), shape[1]
            shapes[f"{bank}.weight"] = ("U8", [experts, rows, 16 * groups])
            shapes[f"{bank}.weight_scale"] = ("F8_E4M3", [experts, 128, 4])
            shapes[f"{bank}.weight_scale_2"] = ("F32", [experts])
            contents[f"{bank}.comfy_quant"] = b'{"format": "nvfp4"}'
        elif not name.endswith("_scales"):
            shapes[name.replace("_proj_bias", "_proj.bias")] = shape
    return base("encoder", shapes, contents)


@cache
def linears() -> dict[str, tuple[int, int]]:
    """[N, K] of the denoiser's."""
    shapes = {name.removesuffix(".weight"): shape for name, (_, shape) in _denoiser().items()}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}


def _lora() -> Base:
    """Three spellings, three kinds of adapters."""
    shapes: dict[str, tuple[str, Sequence[int]]] = {}
    for name, (rows, columns) in linears().items():
        if ".attn." in name:
            shapes[f"transformer.{name}.lora_A.weight"] = ("BF16", [4, columns])
            shapes[f"transformer.{name}.lora_B.weight"] = ("BF16", [rows, 4])
        elif ".img_mlp." in name:
            key = "lora_unet_" + name.replace(".", "_")
            shapes[f"{key}.hada_w1_a"] = shapes[f"{key}.hada_w2_a"] = ("BF16", [rows, 4])
            shapes[f"{key}.hada_w1_b"] = shapes[f"{key}.hada_w2_b"] = ("BF16", [4, columns])
            shapes[f"{key}.alpha"] = ("F32", [])
        elif ".txt_mod." in name:
            shapes[f"lycoris_{name.replace('.', '_')}.lokr_w1"] = ("BF16", [4, 4])
            shapes[f"lycoris_{name.replace('.', '_')}.lokr_w2"] = ("BF16", [rows // 4, columns // 4])
    told = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.rank_pattern": {"img_qkv": 4}}
    good = base("lora", shapes)
    good.header["__metadata__"] = {"lora_adapter_metadata": json.dumps(told), "ss_network_alpha": "8"}
    return good


def _vae() -> Base:
    with torch.device("meta"):
        module = LensVAE(models.VAE).model
    config = {"config.json": json.dumps({"_class_name": "AutoencoderKLFlux2", **models.VAE}).encode()}
    return base("vae", _shapes(module), beside=config)


@cache
def safetensors() -> dict[str, Base]:
    """One of each layout."""
    return {
        "denoiser": base("denoiser", _denoiser()),
        "denoiser for ComfyUI": _comfy(),
        "denoiser by SDNQ": _sdnq(),
        "encoder": base("encoder", _encoder(), {"tokenizer_json": json.dumps(tokenizer_json()).encode()}),
        "encoder for ComfyUI": _nvfp4(),
        "LoRA": _lora(),
        "vae": _vae(),
    }


@dataclass(frozen=True)
class Gguf:
    """A GGUF as its fields: values (key, type, bytes) and tensors (name, sizes, type, offset)."""

    component: str
    values: list[tuple[bytes, int, bytes]]
    tensors: list[tuple[bytes, list[int], int, int]]
    size: int
    version: int = 3
    counts: tuple[int, int] | None = None

    def head(self) -> bytes:
        counts = self.counts or (len(self.tensors), len(self.values))
        parts = [b"GGUF", struct.pack("<IQQ", self.version, *counts)]
        parts += [string(key) + struct.pack("<I", kind) + value for key, kind, value in self.values]
        for name, sizes, kind, offset in self.tensors:
            shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
            parts.append(string(name) + shape + struct.pack("<IQ", kind, offset))
        return b"".join(parts)

    def file(self, head: bytes | None = None) -> File:
        head = self.head() if head is None else head
        return File(head, len(head) + 32 + self.size)


def string(text: bytes) -> bytes:
    """As GGUF has it."""
    return struct.pack("<Q", len(text)) + text


def strings(texts: Sequence[str]) -> bytes:
    """An array of them."""
    return struct.pack("<IQ", 8, len(texts)) + b"".join(string(text.encode()) for text in texts)


def _gguf(component: str, shapes: Shapes, values: list[tuple[bytes, int, bytes]], packed: str) -> Gguf:
    """Matrices whose names hold ``packed`` are Q8_0 (8) or, of rank 3, MXFP4 (39); the rest are F32 (0)."""
    tensors, at = [], 0
    for name, (_, shape) in shapes.items():
        kind = (
            (39 if len(shape) == 3 else 8) if packed in name and shape[-1] % 32 == 0 and len(shape) > 1 else 0
        )
        tensors.append((name.encode(), list(reversed(shape)), kind, at))
        block, nbytes = {0: (1, 4), 8: (32, 34), 39: (32, 17)}[kind]
        at += -(-torch.Size(shape).numel() // block * nbytes // 32) * 32
    return Gguf(component, values, tensors, at)


def _gguf_encoder() -> Gguf:
    shapes: dict[str, tuple[str, Sequence[int]]] = {}
    for name, (dtype, shape) in _encoder().items():
        name = name.replace("model.layers.0.", "blk.0.").replace("model.embed_tokens", "token_embd")
        for old, new in (
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
        ):
            name = name.replace(old, new)
        name = name.replace("self_attn.sinks", "attn_sinks.weight").replace("self_attn.o_proj", "attn_output")
        name = name.replace("mlp.router", "ffn_gate_inp")
        for letter in "qkv":
            name = name.replace(f"self_attn.{letter}_proj", f"attn_{letter}")
        if "experts" not in name:
            shapes[name] = (dtype, shape)
    for part in ("gate", "up", "down"):
        shapes[f"blk.0.ffn_{part}_exps.weight"] = ("U8", (8, 64, 64))
        shapes[f"blk.0.ffn_{part}_exps.bias"] = ("F32", (8, 64))
    content = tokenizer_json()
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens = sorted({**content["model"]["vocab"], **special}.items(), key=lambda item: item[1])
    kinds = [3 if token in special else 1 for token, _ in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    values = [
        (b"general.architecture", 8, string(b"gpt-oss")),
        (b"tokenizer.ggml.model", 8, string(b"gpt2")),
        (b"tokenizer.ggml.tokens", 9, strings([token for token, _ in tokens])),
        (b"tokenizer.ggml.token_type", 9, struct.pack(f"<IQ{len(kinds)}i", 5, len(kinds), *kinds)),
        (b"tokenizer.ggml.merges", 9, strings(merges)),
    ]
    return _gguf("encoder", shapes, values, "exps")


@cache
def ggufs() -> dict[str, Gguf]:
    """One of each component that may be one."""
    values = [
        (b"general.architecture", 8, string(b"lens")),
        (b"general.alignment", 4, struct.pack("<I", 32)),
        (b"split.count", 2, struct.pack("<H", 1)),
        (b"lens.variant", 8, string(b"Lens-Turbo")),
    ]
    return {"denoiser": _gguf("denoiser", _denoiser(), values, "attn"), "encoder": _gguf_encoder()}
