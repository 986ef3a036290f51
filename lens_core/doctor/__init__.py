"""A report on the computer, the fast paths and the files, fit to be pasted into an issue.

``check`` is the command line's and the node's. Nothing is changed, downloaded or installed.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import environment, fast_paths, files, parity
from .references import DenoiserReference
from .report import Finding, OnProgress, Privacy, Report, Section

__all__ = ["DenoiserReference", "Examination", "Finding", "Report", "Section", "check"]
_TITLES = {"denoiser": "denoiser", "encoder": "encoder", "vae": "VAE"}
_NO_HOST = (
    "not compared: its reference is ComfyUI's own Lens, which is not here. The node LensDoctor compares "
    "it, with parity switched on"
)


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Examination:
    """What to look at beside headers, and where to compute; ``dtype`` None is what models have there.

    ``reference`` builds the denoiser's other implementation, which only a host has; ``tokenizer_places`` are
    where a tokenizer.json may lie beside the usual places; ``paths`` leaves folders in the report.
    """

    hashes: bool = False
    values: bool = False
    parity: bool = False
    paths: bool = False
    device: torch.device = _CPU
    dtype: torch.dtype | None = None
    reference: DenoiserReference | None = None
    tokenizer_places: Sequence[Path] = ()

    @property
    def computes(self) -> torch.dtype:
        """In which dtype."""
        if self.dtype is not None:
            return self.dtype
        if self.device.type != "cuda":
            return torch.float32
        with torch.cuda.device(self.device):
            exact = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if exact else torch.float32


def check(
    paths: Sequence[Path],
    examination: Examination,
    on_progress: OnProgress,
    host: Sequence[Section] = (),
) -> Report:
    """The report on files and folders; ``host`` are sections on what this runs in.

    ``on_progress(what, done, total)`` may raise to cancel, which stops everything.
    """
    on_progress("Looking at the computer", 0, 1)
    sections = [environment.section(), *host]
    sections.append(fast_paths.section(examination.device, examination.computes, on_progress))
    items = files.find(paths, examination.paths)
    found = files.Files()
    for number, item in enumerate(items):
        on_progress(f"Looking at {item.label}", number, len(items))
        files.examine(
            item,
            found,
            hashes=examination.hashes,
            values=examination.values,
            tokenizer_places=examination.tokenizer_places,
            on_progress=on_progress,
        )
    if paths:
        sections.append(Section("Files", [*found.findings, *_uncounted(found)]))
    if examination.parity:
        sections.append(Section("Parity", _parity(found, examination, on_progress)))
    private = Privacy([*paths, *(item.path for item in items)], examination.paths)
    return Report([private.section(section) for section in sections])


def _uncounted(found: files.Files) -> list[Finding]:
    """What the folders hold beside parts of Lens."""
    counts = {"LoRA": found.loras, "files of other models": found.others}
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if text:
        return [Finding("and", f"{text}, in order as far as their headers tell")]
    return [] if found.findings else [Finding("none", "nothing here that a loader of Lens would take")]


def _parity(found: files.Files, examination: Examination, on_progress: OnProgress) -> list[Finding]:
    place = {"device": examination.device, "dtype": examination.computes}
    findings = []
    for number, (kind, item) in enumerate(found.components):
        on_progress(f"Comparing {item.label}", number, len(found.components))
        if kind.component == "encoder":
            compare = partial(parity.encoder_parity, item.path, place, examination.tokenizer_places)
        elif kind.component == "vae":
            compare = partial(parity.vae_parity, item.path, place)
        elif examination.reference is not None:
            compare = partial(parity.denoiser_parity, item.path, place, examination.reference)
        else:
            findings.append(Finding(item.label, _NO_HOST))
            continue
        findings.append(parity.tried(item.label, compare))
        gc.collect()
        if examination.device.type == "cuda":
            torch.cuda.empty_cache()
    return findings or [Finding("none", "no sound component among the files: give a Lens folder or files")]
