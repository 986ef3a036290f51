"""Whether models fit a device, in a word and in a line: green, amber or red.

Green: each model is there whole while it works. Amber: some of it is streamed, which is slower. Red: even
streamed it is too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .plan import Component, Components, Plan

NOTHING = Component(())
GREEN, AMBER, RED = "green", "amber", "red"
# Beside the colour, for those who do not see it.
_SIGNS = {GREEN: "✓", AMBER: "!", RED: "✗"}


@dataclass(frozen=True)
class Device:
    """Bytes that it has, and that it can give these models; ``is_cpu``: what it has is the system's RAM."""

    free: float
    total: float
    is_cpu: bool = False


@dataclass(frozen=True)
class Verdict:
    """``needed``: bytes with one whole model there at a time. ``least``: with every layer streamed."""

    level: str
    needed: int
    least: int
    line: str
    details: tuple[str, ...]


def whole(parts: Components) -> int:
    """Bytes at most with one model there at a time, whole but for the modulation, which no step needs."""
    return _leaving(parts, len(parts.encoder.layers), len(parts.denoiser.layers)).peak(parts)


def judge(parts: Components, device: Device, covered: str, advice: Sequence[str] = ()) -> Verdict:
    """What to say of models on a device: what its figures have ``covered``, and ``advice`` where they are
    too large."""
    everything = Plan(len(parts.encoder.layers), len(parts.denoiser.layers), True, True, True).peak(parts)
    needed, least = whole(parts), _leaving(parts, 0, 0).peak(parts)
    if device.is_cpu:
        needed = least = everything
        level = GREEN if needed <= device.free else AMBER if needed <= device.total else RED
        line = f"CPU: needs about {_gb(needed)} of {_gb(device.total)} memory"
        details = [_figures("All of it in memory", everything, parts), _there(device, "free now")]
    else:
        level = GREEN if needed <= device.free else AMBER if least <= device.free else RED
        line = f"{_gb(least if level == RED else needed)} of {_gb(device.free)} free"
        details = [
            _figures("One model on the GPU at a time", needed, parts),
            f"All of them staying there: {_gb(everything)}. Streamed by layers: {_gb(least)}.",
            _there(device, "free for models"),
        ]
    words = _words(level, device.is_cpu)
    details += [] if level == GREEN else list(advice)
    return Verdict(level, needed, least, f"{_SIGNS[level]} {line}{words}", (covered, *details))


def _leaving(parts: Components, encoder: int, denoiser: int) -> Plan:
    return Plan(encoder, denoiser, modulation=False, keep_encoder=False, keep_denoiser=False)


def _words(level: str, is_cpu: bool) -> str:
    if is_cpu:
        return {GREEN: "", AMBER: ": more than is free now", RED: ": too little"}[level]
    return {GREEN: "", AMBER: ": streamed, slower", RED: ": too little, even streamed"}[level]


def _figures(what: str, size: int, parts: Components) -> str:
    plan = _leaving(parts, len(parts.encoder.layers), len(parts.denoiser.layers))
    there = {"encoding": parts.encoder, "sampling": parts.denoiser, "decoding": parts.vae}
    peaks = [
        f"{phase} {peak / 1e9:.1f}" for phase, peak in plan.peaks(parts).items() if there[phase] != NOTHING
    ]
    return f"{what}: {_gb(size)} ({', '.join(peaks)})."


def _there(device: Device, called: str) -> str:
    return f"{_gb(device.free)} of {_gb(device.total)} are {called}."


def _gb(size: float) -> str:
    return f"{max(size, 0) / 1e9:.1f} GB"


def lighter(parts: Components, denoisers: dict[str, Component], free: float) -> str | None:
    """The first of these denoisers (by what they are called) with which ``parts`` would fit whole."""
    fitting = (name for name, part in denoisers.items() if whole(replace(parts, denoiser=part)) <= free)
    return next(fitting, None)
