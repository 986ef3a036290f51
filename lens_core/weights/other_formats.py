"""What a file is that is no safetensors file, by its first bytes; nothing in it is unpacked or run."""

from __future__ import annotations

import re

_PICKLE = "a Python pickle, which can run any program and is never opened"
_ARCHIVE = "an archive; unpack it first"
_PAGE = "a web page; the download went wrong"
_PICTURE = "a picture"
# The first row that matches wins. Letters of text count in either case.
_STARTS: tuple[tuple[bytes, str], ...] = (
    (rb"GGUF", "a GGUF file"),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a zip archive, perhaps a PyTorch .pt or .ckpt file"),
    (rb"\x80[\x02-\x05]", _PICKLE),
    # Protocols 0 and 1 have no mark of their own: an empty container, or a name of what is to be made.
    (rb"\((?:d|l|t|i|c)(?:p\d+)?\n|\((?:lp|dp|tp)\d+\n|[\]})](?:q.|\(|\.)", _PICKLE),
    (rb"\(?[ci][A-Za-z_][\w.]*\n[A-Za-z_]\w*\n", _PICKLE),
    (rb"[\x00-\xff]{257}ustar", "a tar archive, perhaps of old PyTorch weights"),
    (rb"version https://git-lfs", "a Git LFS pointer; the weights themselves were not downloaded"),
    (rb"\s*<(?:!doctype|html|head|\?xml)", _PAGE),
    (rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", _ARCHIVE),
    (rb"\x89PNG\r\n|\xff\xd8\xff|RIFF[\x00-\xff]{4}WEBP|GIF8", _PICTURE),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x89HDF\r\n", "an HDF5 file, as Keras writes them"),
    (rb"[\x00-\xff]{4}TFL3", "a TensorFlow Lite model"),
    (rb"\x08[\x01-\x1f](?:\x12[\x01-\x7f][\x20-\x7e]|:)", "an ONNX model"),
    (rb"\x08\x01\x12[\x80-\xff]|\x0a[\x00-\xff]{1,3}\x0a", "a TensorFlow model"),
)
_ROWS = [(re.compile(pattern, re.IGNORECASE), kind) for pattern, kind in _STARTS]
# As many bytes as the rows look at.
START = 512


def other_format(start: bytes) -> str | None:
    """What a file with these first ``START`` bytes is, or None where nothing is recognised."""
    # A safetensors header of 640 bytes begins as a pickle does.
    if start[4:9] == b"\0\0\0\0{":
        return None
    return next((kind for pattern, kind in _ROWS if pattern.match(start)), None)
