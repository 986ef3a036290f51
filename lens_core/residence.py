"""The components of a pipeline on one device: which is where in each phase, by a plan made beforehand."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import torch

from .denoiser import LensDenoiser
from .denoiser_places import DenoiserPlaces
from .memory.plan import BUFFERS, Components, Plan, choose
from .needs import Picture, largest_below, picture_needs
from .quantized import QuantizedLinear
from .text_encoder import TextEncoder
from .vae import LensVAE

log = logging.getLogger(__name__)
# What the allocator's rounding and the libraries' workspaces take beside the tensors that a plan counts.
MARGIN = 200 << 20


class Residence:
    """Moves encoder, denoiser and VAE as plans say. Where memory is not the limit (a CPU), all stay put.

    ``offload`` is one of ``plan.OFFLOADS``; ``placement`` the encoder's, one of ``config.PLACEMENTS``;
    ``budget`` bytes at most, None for what the device has. ``last`` is the plan that was followed last.
    """

    def __init__(
        self,
        text: TextEncoder,
        denoiser: LensDenoiser,
        vae: LensVAE,
        device: torch.device,
        *,
        offload: str = "auto",
        placement: str = "auto",
        budget: float | None = None,
    ) -> None:
        self.text, self.denoiser, self.vae, self.device = text, denoiser, vae, device
        self.offload, self.placement, self.budget = offload, placement, budget
        self.places = None if device == torch.device("cpu") else DenoiserPlaces(denoiser)
        self.last: Plan | None = None

    def components(self, picture: Picture) -> Components:
        """Sizes of everything for a picture."""
        denoiser = self.denoiser
        quantized = any(isinstance(layer, QuantizedLinear) for layer in denoiser.modules())
        dtype = denoiser.proj_out.weight.dtype
        return picture_needs(
            self.text, self.placement, denoiser, self.vae, picture, self.device, dtype, quantized
        )

    def available(self) -> float:
        """Bytes that this process may use."""
        if self.device.type != "cuda":
            return self.budget or float("inf")
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return min(free, self.budget or free) - MARGIN

    def plan(self, picture: Picture) -> Plan | None:
        """The fastest plan that fits; None on a CPU. Raises OutOfMemory where none does."""
        if self.places is None:
            return None
        parts = self.components(picture)
        plan = choose(parts, self.available(), self.offload, lambda: self.what_fits(picture))
        return self._told(plan, parts)

    def what_fits(self, picture: Picture) -> str:
        """The largest picture of this shape that would fit with everything streamed, in words; "" if none."""
        budget, streamed = self.available(), Plan(0, 0, False, False, False)

        def fits(height: int, width: int) -> bool:
            smaller = replace(picture, height=height, width=width)
            return streamed.peak(self.components(smaller)) <= budget

        size = largest_below(picture.height, picture.width, fits)
        return "" if size is None else f"Pictures of up to {size[1]}x{size[0]} fit."

    def smaller(self, picture: Picture) -> Plan | None:
        """The plan after one that did not fit after all: everything streamed."""
        if self.places is None:
            return None
        parts = self.components(picture)
        return self._told(choose(parts, float("inf"), "stream"), parts)

    def _told(self, plan: Plan, parts: Components) -> Plan:
        if plan != self.last:
            log.info("Memory: %s.", plan.describe(parts))
        self.last = plan
        return plan

    def for_writing(self, working: int) -> torch.device:
        """Ready to write with the encoder's layers and ``working`` bytes beside them; where to do that."""
        if self.places is None or self.placement == "cpu":
            return torch.device("cpu") if self.placement == "cpu" else self.device
        self.clear()
        fixed = self.text.dense or self.placement == "gpu"
        budget = float("inf") if fixed else self.available() - working
        self.text.load(self.device, 0 if self.placement == "stream" else budget)
        return self.device

    def for_encoding(self, plan: Plan | None) -> torch.device:
        """Ready to encode; where to do that."""
        if plan is None or self.places is None or self.placement == "cpu":
            return torch.device("cpu") if self.placement == "cpu" else self.device
        if not plan.keep_encoder:
            self.places.unload()
            self.vae.to("cpu")
        self.text.load(self.device, self._encoder_budget(plan))
        return self.device

    def _encoder_budget(self, plan: Plan) -> float:
        sizes = self.text.layers.sizes
        if self.placement == "stream":
            return 0
        if self.text.dense or self.placement == "gpu" or plan.encoder_layers == len(sizes):
            return float("inf")
        return sum(sizes[: plan.encoder_layers]) + BUFFERS * max(sizes)

    def for_sampling(self, plan: Plan | None) -> None:
        """Ready to sample."""
        if plan is None or self.places is None:
            return
        if not plan.keep_encoder:
            self._leave_encoder()
        self.vae.to(self.device)
        self.places.load(self.device, plan.denoiser_layers, plan.modulation)

    def for_decoding(self, plan: Plan | None) -> None:
        """Ready to decode."""
        if plan is None or self.places is None:
            return
        if not plan.keep_denoiser:
            self.places.unload()
            self._give_back()
        self.vae.to(self.device)

    def clear(self) -> None:
        """Everything leaves the GPU."""
        if self.places is not None:
            self._leave_encoder()
            self.places.unload()
            self.vae.to("cpu")
            self._give_back()

    def _leave_encoder(self) -> None:
        if self.text.unload():
            self._give_back()

    def _give_back(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
