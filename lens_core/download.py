"""Fetch the components of ``sources`` into ComfyUI's models folder: resumable, checked, whole or not at all.

A component is gathered in ``.lens-download`` and moved to its place when every byte is there and every
SHA-256 is right: nothing unfinished ever stands where ComfyUI looks. What a cut connection or Ctrl-C leaves
in there is gone on with, also from another mirror that has the same file.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from .digest import sha256
from .errors import SettingError
from .hub import DownloadError, MirrorFailed, Offer, RemoteFile, get, offer_of
from .sources import BUNDLES, PUBLISHED, SOURCES, Mirror, Source

log = logging.getLogger(__name__)
_STAGING = ".lens-download"


@dataclass
class Wanted:
    """A component to fetch: mirrors not asked yet, why others failed, what the present one is to send."""

    source: Source
    mirrors: list[Mirror]
    reasons: list[str] = field(default_factory=list)
    offer: Offer | None = None
    missing: list[RemoteFile] = field(default_factory=list)


def sources_of(names: Sequence[str]) -> list[Source]:
    """The components of bundles and of components, each once. Raises SettingError for an unknown name."""
    if unknown := [name for name in names if name not in BUNDLES]:
        raise SettingError(f"There is no {', '.join(unknown)} to download. Expected: {', '.join(BUNDLES)}.")
    return [SOURCES[key] for key in dict.fromkeys(part for name in names for part in BUNDLES[name])]


class Downloads:
    """Downloads into ``models``, ComfyUI's models folder.

    ``endpoint`` is the hub's address; None leaves it to huggingface_hub (``HF_ENDPOINT``). ``verify`` hashes
    what is there already, ``overwrite`` replaces files that differ from the published ones. All methods raise
    DownloadError, and SettingError for what the user can put right.
    """

    def __init__(
        self, models: Path, *, endpoint: str | None = None, verify: bool = False, overwrite: bool = False
    ) -> None:
        if not models.is_dir():
            raise SettingError(f"{models} is no folder. Expected ComfyUI's models folder.")
        self.models, self.endpoint, self.verify, self.overwrite = models, endpoint, verify, overwrite

    def plan(self, sources: Sequence[Source]) -> list[Wanted]:
        """What is to be fetched from where; components that are there already are left out."""
        wanted = []
        for source in sources:
            one = Wanted(source, list(source.mirrors))
            mirror = source.mirrors[0]
            if not self._is_there(mirror):
                mirror = self._ask(one)
            if one.missing:
                wanted.append(one)
            else:
                checked = "there and right" if self.verify else "there already"
                log.info("%s is %s: %s", source.what, checked, self.models / mirror.place)
        return wanted

    def check_room(self, wanted: Sequence[Wanted]) -> None:
        """Raise unless every disk has room for what is still to come to it."""
        needed: dict[int, tuple[Path, int]] = {}
        for one in wanted:
            for file in one.missing:
                staged = self._staged(file)
                folder = _existing(staged)
                device = folder.stat().st_dev
                have = sum(path.stat().st_size for path in (staged, _part(staged, file)) if path.is_file())
                needed[device] = (folder, needed.get(device, (folder, 0))[1] + max(0, file.size - have))
        for folder, size in needed.values():
            if (free := shutil.disk_usage(folder).free) < size:
                raise DownloadError(
                    f"{size / 1e9:,.2f} GB are to come, but the disk of {folder} has {free / 1e9:,.2f} GB "
                    "free. Make room, or choose a smaller file: --list shows them."
                )

    def fetch(self, wanted: Wanted) -> list[Path]:
        """Fetch, check and move one component into its place; returns its new files."""
        while wanted.missing:
            assert wanted.offer is not None
            try:
                with self._alone(wanted.offer.mirror.place):
                    return self._fetch(wanted.offer, wanted.missing)
            except MirrorFailed as failure:
                self._note(wanted, wanted.offer.mirror, failure)
                self._ask(wanted)
                self.check_room([wanted])
            except OSError as error:
                raise DownloadError(
                    f"{self.models} cannot be written to ({error.strerror or error}). What has come is kept: "
                    "make room or give access, and start again."
                ) from error
        return []

    def _ask(self, wanted: Wanted) -> Mirror:
        """Take the next mirror that answers, and see what is missing here of what it has."""
        while wanted.mirrors:
            mirror = wanted.mirrors.pop(0)
            try:
                wanted.offer = offer_of(mirror, self.endpoint)
            except MirrorFailed as failure:
                self._note(wanted, mirror, failure)
                continue
            wanted.missing = [file for file in wanted.offer.files if not self._has(file)]
            return mirror
        raise DownloadError(f"{wanted.source.what} cannot be downloaded. {'. '.join(wanted.reasons)}.")

    def _note(self, wanted: Wanted, mirror: Mirror, failure: MirrorFailed) -> None:
        wanted.reasons.append(f"{mirror.repository}: {failure}")
        following = f" Trying {wanted.mirrors[0].repository}." if wanted.mirrors else ""
        log.warning("%s.%s", wanted.reasons[-1], following)

    def _fetch(self, offer: Offer, files: Sequence[RemoteFile]) -> list[Path]:
        for file in files:
            staged = self._staged(file)
            staged.parent.mkdir(parents=True, exist_ok=True)
            # What an earlier run left may have been replaced since, here or there.
            if not (staged.is_file() and staged.stat().st_size == file.size and not _wrong(staged, file)):
                self._fetch_file(offer, file, staged)
        place = offer.mirror.place
        gathered = self._staging(place) / place
        _clear(gathered, {self._staged(file) for file in files})
        _move(gathered, self.models / place)
        return [self.models / file.place for file in files]

    def _fetch_file(self, offer: Offer, file: RemoteFile, staged: Path) -> None:
        part = _part(staged, file)
        get(offer, file, part, self.endpoint)
        if found := _wrong(part, file):
            part.unlink()
            raise MirrorFailed(f"{file.path} came with SHA-256 {found}, expected {file.sha256}")
        os.replace(part, staged)

    def _is_there(self, mirror: Mirror) -> bool:
        """Whether all of a mirror's files are here, as far as the table alone tells."""
        places = [mirror.local(path) for path in mirror.paths]
        files = [
            RemoteFile(path, place, published.size, published.sha256)
            for path, place in zip(mirror.paths, places, strict=True)
            if (published := PUBLISHED.get(place)) and published.size is not None
        ]
        return len(files) == len(places) and all(self._has(file) for file in files)

    def _has(self, file: RemoteFile) -> bool:
        """Whether a file is in its place; one that differs is an error, or is fetched again."""
        path = self.models / file.place
        if not os.path.lexists(path):
            return False
        if not path.is_file():
            raise SettingError(f"{path} is no file, but one is to be written there. Move it away.")
        difference = ""
        if path.stat().st_size != file.size:
            difference = f"{path.stat().st_size:,} bytes, the published file {file.size:,}"
        elif self.verify and (found := _wrong(path, file)):
            difference = f"SHA-256 {found}, the published file {file.sha256}"
        if difference and not self.overwrite:
            raise DownloadError(f"{path} has {difference}. Move it away, or replace it with --overwrite.")
        return not difference

    def _staging(self, place: str) -> Path:
        """Where a component is gathered: on the disk of its place, so that moving it there is a rename."""
        folder = self.models / place.split("/")[0]
        apart = folder.is_dir() and folder.stat().st_dev != self.models.stat().st_dev
        return (folder if apart else self.models) / _STAGING

    def _staged(self, file: RemoteFile) -> Path:
        return self._staging(file.place) / file.place

    @contextmanager
    def _alone(self, place: str) -> Iterator[None]:
        """Keep a second download away from the same partial files, and leave no empty folder behind."""
        staging = self._staging(place)
        staging.mkdir(exist_ok=True)
        lock = FileLock(staging / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise DownloadError(
                f"Another download into {self.models} is under way. Wait for it, then start again."
            ) from error
        try:
            yield
        finally:
            lock.release()
            _tidy(staging)


def _part(staged: Path, file: RemoteFile) -> Path:
    """The partial file, by its contents' hash: another version of the file starts anew."""
    return staged.with_name(f"{staged.name}.{(file.sha256 or str(file.size))[:16]}.part")


def _wrong(path: Path, file: RemoteFile) -> str | None:
    """The file's SHA-256 in hex where it is not the expected one; None where it is, or none is known."""
    if file.sha256 is None:
        return None
    title, total = f"Checking {path.name}", path.stat().st_size
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        found = sha256(path, lambda done, _: bar.update(done - bar.n))
    return None if found == file.sha256 else found


def _clear(gathered: Path, keep: set[Path]) -> None:
    """Delete what other mirrors and earlier versions left beside a component that is whole."""
    beside = gathered.parent.glob(f"{gathered.name}.*.part")
    for path in [*beside, *gathered.rglob("*")]:
        if path.is_file() and path not in keep:
            path.unlink()
    _tidy(gathered)


def _move(staged: Path, final: Path) -> None:
    """Rename a file or a folder to its place; a folder that exists receives the files, an index last."""
    if staged.is_dir() and final.is_dir():
        for child in sorted(staged.iterdir(), key=lambda path: path.name.endswith(".index.json")):
            _move(child, final / child.name)
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staged, final)


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(folder for folder in path.parents if folder.is_dir())


def _tidy(staging: Path) -> None:
    """Remove a staging folder's empty folders, and itself once there is nothing left to go on with."""
    for folder, _, _ in os.walk(staging, topdown=False):
        if os.listdir(folder) in ([], ["lock"] if folder == str(staging) else []):
            shutil.rmtree(folder)
