"""``python -m lens_core download``: the files of Lens, fetched from live mirrors where it was asked for."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .download import Downloads, Wanted, sources_of
from .errors import SettingError
from .sources import BUNDLES, SOURCES

log = logging.getLogger(__name__)


def add_download(commands: Any) -> None:
    """Add the command to ``argparse``'s sub-parsers."""
    parser = commands.add_parser(
        "download",
        help="fetch model files for ComfyUI",
        description="Fetches Lens' files into ComfyUI's models folder. Files that are there stay, mirrors "
        "are tried in order, every file is checked; what was cut or cancelled goes on with the same command.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="what to fetch, e.g. lens-turbo; --list shows all")
    add("--to", type=Path, metavar="DIR", help="ComfyUI's models folder")
    add("--list", action="store_true", help="show all names with their sizes")
    add("--verify", action="store_true", help="hash files that are there already, too")
    add("--overwrite", action="store_true", help="replace files that differ from the published ones")


def download(args: argparse.Namespace) -> Iterator[str]:
    """Lines to print, while the files come. Raises LensError."""
    if args.list:
        yield from _list()
        return
    if not args.names or args.to is None:
        raise SettingError(
            "Say what to fetch and where to, e.g. download lens-turbo --to ComfyUI/models. "
            "--list shows all names."
        )
    for name in ("httpx", "httpx2"):
        # huggingface_hub's client reports each request.
        logging.getLogger(name).setLevel(logging.WARNING)
    downloads = Downloads(args.to, verify=args.verify, overwrite=args.overwrite)
    wanted = downloads.plan(sources_of(args.names))
    if not wanted:
        return
    yield from _plan(wanted, args.to)
    downloads.check_room(wanted)
    try:
        for one in wanted:
            yield from map(str, downloads.fetch(one))
    except KeyboardInterrupt:
        log.info("What has come is kept in %s; the same command goes on there.", args.to)
        raise


def _plan(wanted: Sequence[Wanted], models: Path) -> Iterator[str]:
    for one in wanted:
        for file in one.missing:
            assert one.offer is not None
            source = f"{one.offer.mirror.repository}/{file.path}"
            yield f"{file.size / 1e9:8.2f} GB  {source} -> {models / file.place}"
    total = sum(file.size for one in wanted for file in one.missing)
    free = shutil.disk_usage(models).free
    yield f"{total / 1e9:8.2f} GB to fetch, {free / 1e9:,.2f} GB free in {models}"


def _list() -> Iterator[str]:
    for name, parts in BUNDLES.items():
        mirrors = [SOURCES[part].mirrors[0] for part in parts]
        what = SOURCES[name].what if name in SOURCES else " + ".join(parts)
        total = sum(mirror.gigabytes for mirror in mirrors)
        place = f" -> {mirrors[0].place}" if len(mirrors) == 1 else ""
        yield f"{total:6.2f} GB  {name:20} {what}{place}"
