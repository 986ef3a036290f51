"""Normalised attention guidance (NAG, arXiv 2505.21179): a negative prompt without a second prediction.

Guidance by two predictions asks too much of a model distilled to a few steps, whose predictions for two
prompts lie far apart. Here the image's tokens attend to either prompt in every block, and what they get from
the wanted one is moved away from what they get from the unwanted one. There is one image stream; each
prompt has its own text stream, as attention changes that too. The two lie one after the other in the text
stream, for all but attention takes its tokens one by one.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import SettingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NagOptions:
    """How far attention is moved away from the unwanted prompt; by default not at all.

    ``scale``: how many times the difference of both answers is added to the wanted one's; 0 is off. (The
    published program multiplies by one more: its 5 is 4 here and in the paper.)
    ``tau``: the largest L1 norm of a token's moved answer, relative to the wanted one's.
    ``alpha``: the part of the moved answer in what is used; the rest is the wanted one's.
    """

    scale: float = 0.0
    tau: float = 2.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise SettingError(f"nag_scale must be 0 (off) or a positive number, got {self.scale}.")
        if not 1 <= self.tau < math.inf:
            raise SettingError(
                f"nag_tau must be at least 1, got {self.tau}: below it even the prompt's own attention "
                "would be weakened. The paper's is 2.5."
            )
        if not 0 <= self.alpha <= 1:
            raise SettingError(f"nag_alpha must lie between 0 and 1, got {self.alpha}. The paper's is 0.25.")


NAG_OFF = NagOptions()


@dataclass(frozen=True)
class Negative:
    """What to avoid: ``text`` [B, M, H] as ``embed_text`` gives it, B or one row, M = 0 for an empty prompt;
    ``real`` [B, M] marks real tokens, None when all are."""

    text: Tensor
    options: NagOptions
    real: Tensor | None = None

    def after(self, txt: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None, TwoPrompts]:
        """txt [B, S, H] of the wanted prompt, and this -> [B, S + M, H], its real tokens [B, S + M] if not
        all are, and how it is read."""
        batch, length = txt.shape[:2]
        joint = torch.cat([txt, self.text.expand(batch, -1, -1)], dim=1)
        if real is not None or self.real is not None:
            marks = [
                x.new_ones(x.shape[:2], dtype=torch.bool) if mark is None else mark.to(x.device).bool()
                for x, mark in ((txt, real), (self.text, self.real))
            ]
            real = torch.cat([mark.expand(batch, -1) for mark in marks], dim=1)
        return joint, real, TwoPrompts(length, self.options)


@dataclass(frozen=True)
class TwoPrompts:
    """How a text stream of two prompts is read: its first ``wanted`` tokens are the wanted prompt's."""

    wanted: int
    options: NagOptions

    def split(self, x: Tensor, image: int, dim: int) -> tuple[Tensor, Tensor]:
        """x, along ``dim`` of ``image`` tokens, then both prompts -> image and wanted; image and unwanted."""
        middle = image + self.wanted
        ours, _, rest = x.tensor_split((image, middle), dim)
        return x.narrow(dim, 0, middle), torch.cat([ours, rest], dim)


def guide(wanted: Tensor, unwanted: Tensor, options: NagOptions) -> Tensor:
    """Attention's answers [B, N, H] for either prompt -> what is used in their place.

    Of equal answers, the same bits.
    """
    moved = torch.add(wanted, wanted - unwanted, alpha=options.scale)
    wide = torch.promote_types(wanted.dtype, torch.float32)
    before, after = (torch.linalg.vector_norm(x, 1, -1, True, dtype=wide) for x in (wanted, moved))
    factor = (options.tau * before / after.clamp_min(torch.finfo(wide).tiny)).clamp(max=1)
    return torch.lerp(wanted, moved * factor.to(wanted.dtype), options.alpha)


def warn_without_effect(cfg: float, options: NagOptions, negative: bool) -> None:
    """Say, once, what of the settings does nothing; ``negative``: whether there is one that is not empty."""
    if cfg != 1 and options.scale:
        _say_once("nag_scale has no effect where cfg is not 1: there the negative guides as usual.")
    if cfg == 1 and negative and not options.scale:
        _say_once("The negative has no effect at cfg 1. Set nag_scale (4, say) to have it avoided there.")


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)
