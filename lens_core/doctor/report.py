"""What the doctor says: findings in sections, as text fit for an issue and as JSON.

Nothing personal: folders are left out of every text, or shortened to ``~`` where the user wants them, because
reports are pasted where everybody reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LensError

# (what is being done, done, total); may raise to cancel.
OnProgress = Callable[[str, int, int], None]
# What an examination can fail with. Not every exception: a host's Cancel must pass.
FAULTS = (
    LensError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Findings of one section in the text; a models folder may hold hundreds.
_MOST = 30
_WIDTHS = 18, 44
# An absolute path's folders, as POSIX or Windows writes them: at the start of a word, up to its last name.
_FOLDERS = re.compile(r"""(?<![\w.~:/\\])(?:[A-Za-z]:[\\/]|/)(?:[^\s"'\\/:;,()<>|]+[\\/])+""")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, and what was found; ``facts`` are for machines."""

    name: str
    text: str
    broken: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Findings under a heading."""

    title: str
    findings: Sequence[Finding]

    def lines(self) -> list[str]:
        """The text's lines; what is broken comes always, of the rest what there is room for."""
        shown = [x for x in self.findings if x.broken]
        shown += [x for x in self.findings if not x.broken][: max(0, _MOST - len(shown))]
        width = min(max([_WIDTHS[0], *(len(x.name) for x in shown)]), _WIDTHS[1])
        kept = {id(x) for x in shown}
        lines = [self.title, *(_line(x, width) for x in self.findings if id(x) in kept)]
        left = len(self.findings) - len(shown)
        return lines + ([f"  and {left} more, none of them broken (--json lists all)"] if left else [])


@dataclass(frozen=True)
class Report:
    """All sections."""

    sections: Sequence[Section]

    @property
    def broken(self) -> int:
        """How many findings are broken."""
        return sum(x.broken for section in self.sections for x in section.findings)

    def text(self) -> str:
        """For people."""
        parts = ["\n".join(section.lines()) for section in self.sections]
        count = self.broken
        verdict = f"{count} {'thing is' if count == 1 else 'things are'} BROKEN (marked !)" if count else ""
        return "\n\n".join([*parts, f"Result: {verdict or 'nothing is broken'}."])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sections = [
            {
                "title": section.title,
                "findings": [
                    {"name": x.name, "text": x.text, "broken": x.broken, **x.facts} for x in section.findings
                ],
            }
            for section in self.sections
        ]
        return {"broken": self.broken, "sections": sections}


def _line(finding: Finding, width: int) -> str:
    mark = "!" if finding.broken else " "
    return f"{mark} {finding.name:<{width}}  {finding.text}".rstrip()


class Privacy:
    """Takes folders out of texts: all of them, or with ``paths`` only what lies above the user's home.

    ``known`` are paths that may occur: a pattern alone cannot tell where one with a space in it ends.
    """

    def __init__(self, known: Sequence[Path] = (), paths: bool = False) -> None:
        self.paths = paths
        self._home = str(Path.home())
        folders = {folder for path in known for form in (path, path.absolute()) for folder in form.parents}
        self._known = sorted((str(folder) for folder in folders if len(folder.parts) > 1), key=len)[::-1]

    def __call__(self, text: str) -> str:
        if not self.paths:
            for folder in self._known:
                text = re.sub(re.escape(folder) + r"[\\/]", "", text)
            text = _FOLDERS.sub("", text)
        if len(self._home) > 1:
            text = text.replace(self._home, "~")
            # A folder's name before what lies in it, as errors have it.
            text = re.sub(rf"(?<![\w./~-]){re.escape(Path(self._home).name)}(?=[\\/])", "~", text)
        return text

    def section(self, section: Section) -> Section:
        """The same without folders; ``facts`` are left, so nothing personal may be among them."""
        findings = [Finding(self(x.name), self(x.text), x.broken, x.facts) for x in section.findings]
        return Section(section.title, findings)


def sentence(error: BaseException) -> str:
    """What an exception says, in one line; its type too where it was not raised for a user."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, LensError) else f"{type(error).__name__}: {text}"
