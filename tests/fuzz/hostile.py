"""Contents of other formats, and files that were made to do harm: what each is called in the refusal."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from tests.fuzz.bases import safetensors, string

PICKLE, ZIP, ARCHIVE, TAR = "a Python pickle", "a zip archive", "an archive", "a tar archive"


class _Runs:
    """Unpickled, it would run a program."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("unpickled!",)


def _saved(**settings: bool) -> bytes:
    file = io.BytesIO()
    torch.save(OrderedDict(weight=torch.zeros(3)), file, **settings)
    return file.getvalue()


def _zip(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file.getvalue()


def _numpy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def _pickles() -> dict[str, bytes]:
    objects = {"dict": {"a": [1.5, None]}, "program": _Runs(), "list": [1, "x"], "ordered": OrderedDict(a=1)}
    return {
        f"pickle {protocol} of a {name}": pickle.dumps(thing, protocol)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
        for name, thing in objects.items()
    }


@cache
def named() -> dict[str, tuple[bytes, str]]:
    """Content, and what the refusal calls it."""
    return {
        **{name: (content, PICKLE) for name, content in _pickles().items()},
        "torch.save": (_saved(), ZIP),
        "torch.save before 1.6": (_saved(_use_new_zipfile_serialization=False), PICKLE),
        "torch's tar": (_tar(), TAR),
        "zip bomb": (_zip("a.safetensors", bytes(30_000_000)), ZIP),
        "pickle in a zip": (_zip("data.pkl", pickle.dumps(_Runs())), ZIP),
        "good file in a zip": (_zip("model.safetensors", safetensors()["denoiser"].good().start), ZIP),
        "empty zip": (b"PK\x05\x06" + bytes(18), ZIP),
        "npz": (_zip("a.npy", _numpy()), ZIP),
        "gzip bomb": (gzip.compress(bytes(30_000_000)), ARCHIVE),
        "xz": (lzma.compress(b"weights"), ARCHIVE),
        "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(24), ARCHIVE),
        "zstd": (b"\x28\xb5\x2f\xfd\x24\x00\x01\x00\x00", ARCHIVE),
        "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(20), ARCHIVE),
        "numpy": (_numpy(), "a NumPy array"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "a picture"),
        "jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(20), "a picture"),
        "webp": (b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(20), "a picture"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(30), "an HDF5 file"),
        "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(30), "a TensorFlow Lite model"),
        "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x8a\x01\n\x10", "an ONNX model"),
        "tensorflow": (b"\x08\x01\x12\xb5\x91\x02\n\x80\x01\n\x04", "a TensorFlow model"),
        "lfs": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 82084\n",
            "a Git LFS pointer",
        ),
        "html": (b"\n\n<!DOCTYPE html><html></html>", "a web page"),
        "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    }


def _header(text: bytes, rest: int = 0) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(rest)


def _gguf(counts: tuple[int, int], rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + rest


def unnamed() -> dict[str, bytes]:
    """What has no name, or asks for more than a computer has."""
    tiny = ",".join(
        f'"t{index}":{{"dtype":"F32","shape":[],"data_offsets":[{4 * index},{4 * index + 4}]}}'
        for index in range(200_000)
    )
    empty = (
        "{"
        + ",".join(
            f'"t{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for index in range(250_000)
        )
        + "}"
    )
    array = string(b"a") + struct.pack("<IIQ", 9, 9, 2**60)
    nested = string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000
    return {
        "empty": b"",
        "a byte": b"\x80",
        "text": b"401 Client Error: Unauthorized for url",
        "json": b'{"error": "Repository not found"}',
        "a million tensors": _header(("{" + tiny + "}").encode(), 800_000),
        "a million tensors without bytes": _header(empty.encode()),
        "lists of nothing": _header(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
        "objects of nothing": _header(
            b"{" + b",".join(b'"%x":{}' % index for index in range(1_300_000)) + b"}"
        ),
        "a long number": _header(
            b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,0]}}'
        ),
        "many long numbers": _header(
            b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 3000) + b'],"data_offsets":[0,0]}}'
        ),
        "a long name": _header(
            json.dumps({"a" * 10**7: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
        ),
        "deeper than a stack": _header(b"[" * 10**7),
        "objects deeper than a stack": _header(b'{"a":' * 10**6),
        "gguf of 2**60 values": _gguf((0, 2**60)),
        "gguf of 2**60 tensors": _gguf((2**60, 0)),
        "gguf of tensors of nothing": _gguf((100_000, 0), bytes(24 * 100_000)),
        "gguf of 2**60 arrays": _gguf((0, 1), array + bytes(1000)),
        "gguf of nested arrays": _gguf((0, 1), nested),
        "gguf of empty strings": _gguf(
            (0, 1), string(b"a") + struct.pack("<IIQ", 9, 8, 3_000_000) + bytes(8 * 3_000_000)
        ),
        "gguf of 2**61 numbers": _gguf((0, 1), string(b"a") + struct.pack("<IIQ", 9, 12, 2**61)),
        "gguf of a long string": _gguf((0, 1), string(b"a") + struct.pack("<IQ", 8, 2**63) + bytes(2**21)),
        "big-endian gguf": b"GGUF" + struct.pack(">IQQ", 3, 1, 1),
        "old ggml": b"lmgg" + bytes(100),
    }
