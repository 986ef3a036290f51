"""Spoils good files; every function takes a ``random.Random`` and decides by nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from math import prod
from random import Random
from typing import Any

from tests.fuzz.bases import Base, File, Gguf, string

LENGTHS = (0, 1, 2, 7, 2**16, 2**24, 2**31, 2**32, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
NAMES = (
    "",
    "x",
    "__metadata__",
    "transformer_blocks.999999999.attn.img_qkv.weight",
    "transformer_blocks.99999.attn.img_qkv.weight",
    "model.diffusion_model.img_in.weight",
    "txt_norm.4000000000.weight",
    "model.layers.123456789.self_attn.sinks",
    "layers.0.mlp.experts.gate_up_proj.comfy_quant",
    "transformer_blocks.0.attn.img_qkv.zero_point",
    "transformer_blocks.0.attn.img_qkv.scale_weight",
    "transformer_blocks.0.attn.img_qkv.pre_quant_scale",
    "transformer_blocks.0.attn.img_qkv.svd_up",
    "scaled_fp8",
    "tokenizer_json",
    "bn.running_mean",
    "block.0.mlp.mlp1_weight.blocks",
    "encoder.down.0.block.77777777.conv1.weight",
    "../../../etc/passwd",
    "a" * 10_000,
    "%s%n{0}{name}",
    "zero\0byte",
    "\x1b[2J\x1b[31mred",
    "line\nline",
    "\u202egnp.exe",
    "\ud800",
    "名前.重み",
)
NUMBERS = (-1, 0, 1, 2, 3, 64, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40, 1.5, 1e300, -0.0)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *NAMES[-8:],
    None,
    True,
    False,
    float("inf"),
    float("nan"),
    [],
    {},
    [[]],
    [{}],
    [None],
    [0],
    [1, 1],
    [-1, 5],
    [0] * 100,
    [2**62] * 3,
    [2**32, 2**32],
    [1.0, 2.0],
    [True, False],
    ["0", "4"],
    {"a": {"b": {}}},
    {"dtype": "F32"},
    *("F32", "F64", "BF16", "U8", "I8", "BOOL", "F8_E8M0", "F4", "F6_E2M3", "U16", "C64", "Q8_0", "f32"),
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "U8",
    "I8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "U16",
)


def value(rng: Random) -> Any:
    """Any JSON value, likely the wrong one; at times in others."""
    found = deepcopy(rng.choice(VALUES))
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2, 60))):
        found = [found] if rng.random() < 0.5 else {"x": found}
    return found


def spoil_json(rng: Random, content: Any) -> Any:
    """A copy with one to three values of it replaced, removed, repeated or renamed, however deep."""
    content = deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = content
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = rng.choice(keys)
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                _spoil_entry(rng, place, key)
                break
            place = place[key]
    return content


def _spoil_entry(rng: Random, place: Any, key: Any) -> None:
    how = rng.random()
    if how < 0.15:
        del place[key]
    elif how < 0.3 and isinstance(place, dict):
        place[rng.choice(NAMES)] = place.pop(key)
    elif how < 0.4 and isinstance(place, list):
        place += [place[key]] * rng.choice((1, 50))
    elif how < 0.5 and isinstance(place[key], int):
        place[key] += rng.choice((-1, 1, 8, 10**9))
    else:
        place[key] = value(rng)


def spoil_bytes(rng: Random, content: bytes) -> bytes:
    """Some bytes changed, or a piece cut out, doubled or moved."""
    changed = bytearray(content)
    how = rng.randrange(4)
    if not changed:
        return b"\0" * rng.randrange(20)
    if how == 0:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif how == 1:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    else:
        at, length = rng.randrange(len(changed)), rng.randint(1, 64)
        piece = changed[at : at + length]
        if how == 2:
            del changed[at : at + length]
        else:
            where = rng.randrange(len(changed))
            changed[where:where] = piece
    return bytes(changed)


def dumps(rng: Random, content: Any) -> bytes:
    """JSON as some writer may have it, with names twice and numbers that are none."""
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05:
        text = text.replace("{", '{"__metadata__":{},"__metadata__":{},', 1)
    if rng.random() < 0.05:
        text = text.replace("[0,", rng.choice(("[0.0,", "[-0,", "[0e0,", "[00,", "[" + "9" * 5000 + ",")), 1)
    return text.encode("utf-8", "surrogatepass")


# Of a safetensors file.


def changed_header(rng: Random, good: Base) -> File:
    return good.file(dumps(rng, spoil_json(rng, good.header)))


def changed_field(rng: Random, good: Base) -> File:
    """One field of one tensor; what else it says stays true more often than by chance."""
    header = deepcopy(good.header)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    field = rng.choice(("dtype", "shape", "shape", "data_offsets", "name", "entry"))
    if field == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif field == "shape":
        shape = entry["shape"]
        rng.shuffle(shape)
        entry["shape"] = rng.choice((shape, [*shape, 1], [1, *shape], [prod(shape)], [*shape, 0], value(rng)))
    elif field == "data_offsets":
        start, stop = entry["data_offsets"]
        shift = rng.choice((1, -1, 8, stop - start, start - stop, 2**40, 2**64))
        spans = ([stop, start], [start + shift, stop + shift], [start, stop + shift], [start + shift, stop])
        entry["data_offsets"] = rng.choice((*spans, [0, stop - start], value(rng)))
    elif field == "name":
        header[rng.choice(NAMES)] = header.pop(name)
    else:
        header[name] = value(rng)
    return good.file(dumps(rng, header))


def other_tensors(rng: Random, good: Base) -> File:
    """A header that is in order: tensors renamed, left out, swapped or added, their places true."""
    names = [name for name in good.header if name != "__metadata__"]
    entries = [(name, good.header[name]["dtype"], good.header[name]["shape"]) for name in names]
    for _ in range(rng.randint(1, 3)):
        index = rng.randrange(len(entries))
        name, dtype, shape = entries[index]
        entries[index] = rng.choice(
            (
                (rng.choice(NAMES), dtype, shape),
                (
                    name,
                    rng.choice(("U8", "BF16", "F8_E4M3", "F8_E5M2", "F32", "F8_E8M0", "F4", "I64")),
                    shape,
                ),
                (name, dtype, [rng.choice((0, 1, 2, 3, 7, 64, 65, 4096)) for _ in range(rng.randint(0, 4))]),
                (rng.choice(names), dtype, shape),
                (name, dtype, shape[::-1]),
            )
        )
    bits = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U8": 8, "BF16": 16, "F32": 32, "F4": 4, "I64": 64}
    header: dict[str, Any] = {"__metadata__": good.header["__metadata__"]}
    at = 0
    for name, dtype, shape in {entry[0]: entry for entry in entries}.values():
        end = at + prod(shape) * bits[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return replace(good, size=at).file(dumps(Random(0), header))


def changed_metadata(rng: Random, good: Base) -> File:
    layers = {"transformer_blocks.0.attn.img_qkv": {"format": "float8_e4m3fn"}}
    told = json.dumps(spoil_json(rng, {"format_version": "1.0", "layers": layers}))
    metadata = {"_quantization_metadata": told, "lens.variant": str(value(rng)), "format": "pt"}
    header = {**good.header, "__metadata__": metadata if rng.random() < 0.6 else spoil_json(rng, metadata)}
    return good.file(dumps(rng, header))


def changed_contents(rng: Random, good: Base) -> File:
    """The bytes of tensors that are read when a file is opened: formats of layers, tokenizers."""
    if not good.data:
        return changed_metadata(rng, good)
    if rng.random() < 0.5:
        return replace(good, data=spoil_bytes(rng, good.data)).good()
    text = dumps(
        rng, spoil_json(rng, {"format": "nvfp4", "params": {"convrot": True}, "bits": 4, "group_size": 64})
    )
    text = text[: len(good.data)].ljust(len(good.data))
    return replace(good, data=text).good()


def changed_length(rng: Random, good: Base) -> File:
    text = json.dumps(good.header).encode()
    near = (len(text) - 1, len(text) + 1, len(text) + good.size, len(text) + good.size + 1)
    return good.file(text, rng.choice((*LENGTHS, *near)))


def changed_bytes(rng: Random, good: Base) -> File:
    text = json.dumps(good.header).encode()
    if rng.random() < 0.2:
        content = spoil_bytes(rng, struct.pack("<Q", len(text)) + text)
        return File(content, len(content) + good.size)
    return good.file(spoil_bytes(rng, text))


def other_encoding(rng: Random, good: Base) -> File:
    text = json.dumps(good.header)
    how = rng.randrange(6)
    if how < 3:
        return good.file(text.encode(("utf-16", "utf-32", "utf-8-sig")[how]))
    pad = rng.choice((" ", "\n", "\0", "x", "{", "}")) * rng.choice((1, 8, 4096))
    return good.file((text + pad if how > 3 else pad + text).encode())


def deep(rng: Random, good: Base) -> File:
    """Nested further than any parser's stack goes."""
    depth, (left, right) = rng.choice((500, 10_000, 200_000)), rng.choice(("[]", ('{"a":', "}")))
    middle = "0" if left != "[" else ""
    text = left * depth + middle + right * (depth if rng.random() < 0.7 else 0)
    return good.file(rng.choice(('{"a":%s}', "%s", '{"__metadata__":{"a":%s}}')).replace("%s", text).encode())


def many(rng: Random, good: Base) -> File:
    """Thousands of tensors without a byte; one of them may make it a denoiser."""
    name = rng.choice(
        ("t%d", "transformer_blocks.%d.attn.img_qkv.weight", "layers.%d.mlp.experts.gate_up_proj_blocks")
    )
    entry = '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(f'"{name % index}{entry}' for index in range(rng.choice((1000, 3000)))) + "}"
    return File.of(struct.pack("<Q", len(text)) + text.encode())


def cut(rng: Random, file: File) -> File:
    """The file up to anywhere, often the ends of its parts, or with more behind."""
    starts = (rng.randrange(20), len(file.start) + rng.randint(-9, 9), rng.randrange(len(file.start) + 1))
    size = max(0, rng.choice((*starts, file.size - 1, file.size + 1, file.size + rng.choice((8, 10**6)))))
    return File(file.start[:size], size)


SAFETENSORS: dict[Callable[[Random, Base], File], int] = {
    changed_header: 5,
    changed_field: 5,
    other_tensors: 4,
    changed_metadata: 2,
    changed_contents: 3,
    changed_length: 1,
    changed_bytes: 4,
    other_encoding: 1,
    deep: 1,
}


# Of a GGUF.


def _number(rng: Random) -> int:
    return rng.choice((*LENGTHS, rng.randrange(300), rng.randrange(300), 32, 64))


def _a_value(rng: Random) -> tuple[int, bytes]:
    """A type and bytes that may be one of it."""
    kind = rng.choice((*range(14), 255, 2**31))
    if kind == 8:
        return kind, rng.choice(
            (string(rng.choice(NAMES).encode("utf-8", "surrogatepass")), struct.pack("<Q", _number(rng)))
        )
    if kind == 9:
        inner, count = rng.choice((*range(14), 99)), _number(rng)
        return kind, struct.pack("<IQ", inner, count) + bytes(rng.choice((0, 8, 1000)))
    if rng.random() < 0.1:  # arrays in arrays
        return 9, struct.pack("<IQ", 9, 1) * rng.choice((1, 2, 5000)) + bytes(12)
    return kind, struct.pack("<Q", _number(rng) % 2**64)[: rng.choice((1, 2, 4, 8))]


def changed_value(rng: Random, good: Gguf) -> File:
    values = list(good.values)
    index = rng.randrange(len(values))
    key, kind, content = values[index]
    how = rng.randrange(4)
    if how == 0:
        values[index] = (key, *_a_value(rng))
    elif how == 1:
        values[index] = (rng.choice(NAMES).encode("utf-8", "surrogatepass"), kind, content)
    elif how == 2:
        values.append(rng.choice(values))
    else:
        values[index] = (key, kind, spoil_bytes(rng, content))
    return replace(good, values=values).file()


def changed_tensor(rng: Random, good: Gguf) -> File:
    tensors = list(good.tensors)
    index = rng.randrange(len(tensors))
    name, sizes, kind, offset = tensors[index]
    how = rng.randrange(6)
    if how == 0:
        sizes = [_number(rng) % 2**64 for _ in range(rng.choice((0, 1, 2, 3, 4, 8, 9, 200)))]
    elif how == 1:
        sizes = [size + rng.choice((-1, 0, 1, 32)) for size in sizes]
    elif how == 2:
        kind = rng.choice((*range(42), 250, 2**32 - 1))
    elif how == 3:
        offset = rng.choice((*LENGTHS, good.size, good.size - 1, offset + 1))
    elif how == 4:
        name = rng.choice((*NAMES, tensors[0][0].decode())).encode("utf-8", "surrogatepass")
    else:
        return replace(good, tensors=[*tensors[:index], *tensors[index + 1 :]]).file()
    tensors[index] = (name, sizes, kind, offset)
    return replace(good, tensors=tensors).file()


def changed_counts(rng: Random, good: Gguf) -> File:
    counts = (len(good.tensors), len(good.values))
    wrong = tuple(rng.choice((count, count + rng.choice((-1, 1)), _number(rng))) for count in counts)
    version = rng.choice((3, 3, 3, 2, 1, 0, 4, 0x03000000, 2**32 - 1))
    return replace(good, counts=wrong, version=version).file()  # type: ignore[arg-type]


def changed_gguf_bytes(rng: Random, good: Gguf) -> File:
    head = good.head()
    end = rng.choice((200, 600, len(head)))
    return good.file(head[:4] + spoil_bytes(rng, head[4:end]) + head[end:])


GGUF: dict[Callable[[Random, Gguf], File], int] = {
    changed_value: 4,
    changed_tensor: 5,
    changed_counts: 1,
    changed_gguf_bytes: 4,
}
