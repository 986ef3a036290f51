"""Which component is where while a picture is made: arithmetic over bytes, before anything is moved.

A picture has three phases: the prompts are encoded, the latents sampled, the picture decoded. In each, one
component works, and others may stay. All sizes are bytes on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .recovery import OutOfMemory

# auto: as much resident as fits; none: all of it; model: each component leaves when its phase is over;
# stream: as model, and layers come one by one.
OFFLOADS = ("auto", "none", "model", "stream")
# Layers on the GPU at a time while layers are streamed: one computes, one arrives.
BUFFERS = 2


@dataclass(frozen=True)
class Component:
    """Bytes of ``layers`` that can be streamed, of the ``rest`` that is there whenever the component is, and
    of what computing takes (``working``). ``first``: layers needed before the others, and then no more."""

    layers: tuple[int, ...]
    rest: int = 0
    working: int = 0
    first: tuple[int, ...] = ()

    def held(self, count: int, first: bool = False) -> int:
        """With ``count`` layers resident, between runs."""
        return self.rest + sum(self.layers[:count]) + (sum(self.first) if first else 0)

    def peak(self, count: int, first: bool = False) -> int:
        """While it works."""
        streams = 0 if first else _buffers(self.first)
        return self.held(count, first) + max(streams, _buffers(self.layers[count:]) + self.working)


def _buffers(layers: tuple[int, ...]) -> int:
    return min(BUFFERS, len(layers)) * max(layers, default=0)


@dataclass(frozen=True)
class Components:
    """All three; the VAE has no layers to stream."""

    encoder: Component
    denoiser: Component
    vae: Component


@dataclass(frozen=True)
class Plan:
    """How many layers are resident in each phase, and what stays when a phase is over."""

    encoder_layers: int
    denoiser_layers: int
    modulation: bool
    keep_encoder: bool
    keep_denoiser: bool

    def peaks(self, parts: Components) -> dict[str, int]:
        """Bytes at most in each phase: of a second picture, which finds there what the first left."""
        encoder, denoiser, vae = parts.encoder, parts.denoiser, parts.vae
        held = denoiser.held(self.denoiser_layers, self.modulation) if self.keep_denoiser else 0
        kept = encoder.held(self.encoder_layers) if self.keep_encoder else 0
        there = vae.held(0)
        # What was not to be kept beside the encoder leaves before the next prompt.
        others = held + there if self.keep_encoder else 0
        return {
            "encoding": others + encoder.peak(self.encoder_layers),
            "sampling": kept + there + denoiser.peak(self.denoiser_layers, self.modulation),
            "decoding": kept + held + vae.peak(0),
        }

    def peak(self, parts: Components) -> int:
        """Bytes of the largest phase."""
        return max(self.peaks(parts).values())

    def describe(self, parts: Components) -> str:
        """The plan in words, with its figures."""
        layers = ((self.encoder_layers, parts.encoder), (self.denoiser_layers, parts.denoiser))
        encoder, denoiser = (_share(count, len(part.layers)) for count, part in layers)
        leaves = "stays" if self.keep_encoder else "leaves after encoding"
        modulation = "resident" if self.modulation else "streamed once"
        over = "stays" if self.keep_denoiser else "leaves before decoding"
        peaks = ", ".join(f"{phase} {size / 1e9:.1f}" for phase, size in self.peaks(parts).items())
        return (
            f"encoder {encoder}, {leaves}; denoiser {denoiser}, modulation {modulation}, {over} "
            f"(GB at most: {peaks})"
        )


def choose(
    parts: Components, budget: float, offload: str = "auto", smaller: Callable[[], str] = lambda: ""
) -> Plan:
    """The plan that moves least and fits ``budget`` bytes; raises OutOfMemory if none does.

    ``smaller`` says which size of picture would fit, if it is the size.
    """
    plans = list(_plans(parts, budget, offload))
    for plan in plans:
        if plan.peak(parts) <= budget:
            return plan
    raise _too_small(parts, min(plans, key=lambda plan: plan.peak(parts)), budget, offload, smaller)


def _plans(parts: Components, budget: float, offload: str) -> Iterator[Plan]:
    """From the fastest to the smallest."""
    whole = Plan(len(parts.encoder.layers), len(parts.denoiser.layers), True, True, True)
    if offload in ("auto", "none"):
        yield whole
        yield replace(whole, modulation=False)
    if offload in ("auto", "model"):
        for keep in (True, False) if offload == "auto" else (False,):
            leaving = replace(whole, keep_encoder=False, keep_denoiser=keep)
            yield leaving
            yield replace(leaving, modulation=False)
    alone = replace(whole, modulation=False, keep_encoder=False, keep_denoiser=False)
    if offload == "auto":
        fits = _fitting(parts.encoder, budget), _fitting(parts.denoiser, budget - parts.vae.held(0))
        partly = replace(alone, encoder_layers=fits[0], denoiser_layers=fits[1])
        yield replace(partly, keep_denoiser=True)
        yield partly
    if offload in ("auto", "stream"):
        yield replace(alone, encoder_layers=0, denoiser_layers=0)


def _fitting(part: Component, budget: float) -> int:
    """Layers that can be resident while it works."""
    return next((count for count in range(len(part.layers), 0, -1) if part.peak(count) <= budget), 0)


def _share(count: int, of: int) -> str:
    if count == of:
        return "resident"
    return f"with {count} of {of} layers resident, others streamed" if count else "streamed"


def _too_small(
    parts: Components, plan: Plan, budget: float, offload: str, smaller: Callable[[], str]
) -> OutOfMemory:
    phase, needed = max(plan.peaks(parts).items(), key=lambda item: item[1])
    advice = [] if offload == "auto" else ["Leave --offload at auto."]
    if phase == "encoding":
        advice.append("Leave --encoder_placement at auto, or encode on the CPU (--encoder_placement cpu).")
    else:
        advice.append(smaller() or "Draw a smaller picture or fewer at a time (--n 1).")
    if phase == "sampling":
        advice.append("Quantise the denoiser (--quant_transformer int8_dynamic or uint4_sdnq).")
    return OutOfMemory(
        f"CUDA out of memory: {phase} takes {needed / 1e9:.1f} GB at least with --offload {offload}, and "
        f"{max(budget, 0) / 1e9:.1f} GB are there. {' '.join(advice)}"
    )
