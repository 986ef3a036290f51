"""Errors that a person reads: what was expected, what came, what to do.

Every error that this package raises on purpose derives from ``LensError``; anything else that
escapes is a bug. The node layer and the command line show the message as it is.
"""

from __future__ import annotations

_LONGEST = 4000


class LensError(Exception):
    """Base of all errors raised on purpose; the message is a sentence fit for a user.

    Files get their names into messages, and may be made to do harm there: what no terminal should get is
    escaped, and the middle of a message that is too long left out.
    """

    def __init__(self, message: str = "") -> None:
        shown = "".join(_escaped(letter) for letter in _shortened(message.replace("\n", " ")))
        super().__init__(shown)


def _shortened(message: str) -> str:
    half = _LONGEST // 2
    return message if len(message) <= _LONGEST else f"{message[:half]} ... {message[-half:]}"


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]


class CheckpointError(LensError):
    """A file cannot be read, or holds something else than what was asked for."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint's tensors are not the ones that the module needs.

    Every missing, unexpected and wrong-shaped tensor is in the lists; the message names the first of
    each kind, since a whole wrong file has a thousand.
    """

    def __init__(
        self,
        what: str,
        missing: list[str],
        unexpected: list[str],
        wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        self.missing, self.unexpected, self.wrong_shape = missing, unexpected, wrong_shape
        parts = [f"{what} does not hold the tensors that this model needs."]
        if missing:
            parts.append(f"Missing ({len(missing)}): {first_of(missing)}.")
        if unexpected:
            parts.append(f"Unexpected ({len(unexpected)}): {first_of(unexpected)}.")
        if wrong_shape:
            listed = [f"{name} should be {list(want)}, is {list(got)}" for name, want, got in wrong_shape]
            parts.append(f"Wrong shape ({len(wrong_shape)}): {first_of(listed)}.")
        parts.append("Download the file again, or choose one made for Lens.")
        super().__init__(" ".join(parts))


def first_of(names: list[str], count: int = 12) -> str:
    """The first names, and how many more there are, for a message."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


class MissingPackage(LensError):
    """A Python package is missing or too old; the message holds the pip line."""


class SizeError(LensError):
    """A picture size that the model cannot make."""


class SettingError(LensError):
    """A setting outside its range, or two settings that do not go together."""


class ReasonerError(LensError):
    """The model that was to rewrite a prompt gave no answer."""
