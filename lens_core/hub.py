"""The Hugging Face hub: what a mirror offers of a component, and the bytes of one file.

Asked through huggingface_hub, whose settings (``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``) count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from .errors import LensError, MissingPackage
from .sources import PUBLISHED, Mirror

# What a folder is asked for: no pickles, no programs, no pictures of a model card.
_WANTED = {".safetensors", ".json", ".gguf"}
# Seconds until a hub that does not answer is given up.
_TIMEOUT = 15
_STATUS = {
    401: "not public, or withdrawn (401); log in with `hf auth login` if your account may read it",
    403: "not allowed (403); its page may ask you to accept terms first",
    404: "not there any more (404)",
    416: "the file has changed (416)",
    429: "too many requests (429)",
}


class DownloadError(LensError):
    """No mirror had the file, it is not the published one, or there is no room for it."""


class MirrorFailed(LensError):
    """Why this mirror cannot serve; the next one may."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that a mirror offers: its path there, its place below the models folder, bytes and SHA-256."""

    path: str
    place: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Offer:
    """What a mirror has of a component, at one commit."""

    mirror: Mirror
    commit: str
    files: tuple[RemoteFile, ...]


def offer_of(mirror: Mirror, endpoint: str | None = None) -> Offer:
    """Ask the hub for a mirror's files; ``endpoint`` is its address. Raises MirrorFailed."""
    api = _huggingface_hub().HfApi(endpoint=endpoint)
    try:
        info = api.model_info(mirror.repository, files_metadata=True, timeout=_TIMEOUT)
    except Exception as error:
        raise MirrorFailed(_reason(error)) from error
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    if absent := [path for path in mirror.paths if not _below(path, there)]:
        raise MirrorFailed(f"it has no {', '.join(absent)}")
    paths = [name for path in mirror.paths for name in _below(path, there)]
    return Offer(mirror, info.sha or "main", tuple(_remote_file(mirror, there[path]) for path in paths))


def get(offer: Offer, file: RemoteFile, part: Path, endpoint: str | None = None) -> None:
    """Append to ``part`` what it lacks of a file, with a progress bar. Raises MirrorFailed, and OSError of
    this machine's disk.

    By ``http_get``, since ``hf_hub_download`` throws away the partial file of a download that was cut.
    """
    hub = _huggingface_hub()
    from huggingface_hub.file_download import http_get

    url = hub.hf_hub_url(offer.mirror.repository, file.path, revision=offer.commit, endpoint=endpoint)
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    with open(part, "ab") as stream:
        if stream.tell() > file.size:
            stream.truncate(0)
        try:
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=PurePosixPath(file.place).name,
            )
        except Exception as error:
            # The disk's errors have a number, huggingface_hub's do not.
            if getattr(error, "errno", None):
                raise
            raise MirrorFailed(_reason(error)) from error


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackage("Downloads need huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


def _below(path: str, there: dict[str, Any]) -> list[str]:
    """The wanted files of a folder, which ends in a slash, or the one file itself."""
    if not path.endswith("/"):
        return [path] if path in there else []
    return [name for name in there if name.startswith(path) and PurePosixPath(name).suffix in _WANTED]


def _remote_file(mirror: Mirror, sibling: Any) -> RemoteFile:
    """One file of the listing, held against what is published of it."""
    path, lfs = sibling.rfilename, sibling.lfs
    if ".." in path.split("/") or "\\" in path or ":" in path or not path.isprintable():
        raise MirrorFailed(f"it offers a file with the unusable name {path!r}")
    place = mirror.local(path)
    size, sha256 = sibling.size, lfs.sha256 if lfs else None
    published = PUBLISHED.get(place)
    if size is None:
        raise MirrorFailed(f"it does not say how large {path} is")
    if published and published.size not in (None, size):
        raise MirrorFailed(f"its {path} has {size:,} bytes, and the published one {published.size:,}")
    if published and published.sha256 and sha256 not in (None, published.sha256):
        raise MirrorFailed(f"its {path} has SHA-256 {sha256}, and the published one {published.sha256}")
    return RemoteFile(path, place, size, sha256 or (published.sha256 if published else None))


def _reason(error: Exception) -> str:
    """One short line about an error of huggingface_hub or of the connection below it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _STATUS:
        return _STATUS[status]
    if "Timeout" in type(error).__name__:
        return "no answer in time"
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
