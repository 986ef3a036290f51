"""What turns the encoder's last layer into words: the final norm and lm_head, on the device while needed.

1.2 GB of GPT-OSS-20B that encoding never uses; so they are taken from the encoder's file for as long as a
prompt is written, and let go after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EncoderConfig
from ..ops import CastingOperations, Operations
from ..text_encoder import TextEncoder

OnPiece = Callable[[int, int], None]
# Rows moved, or multiplied where they must be cast, at a time: 47 MB of GPT-OSS-20B's in bf16.
_ROWS = 8192


class LanguageHead(nn.Module):
    """``norm`` [H] and ``lm_head`` [V, H] under the checkpoint's names."""

    def __init__(
        self,
        config: EncoderConfig,
        operations: Operations = CastingOperations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm = operations.RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = operations.Linear(hidden, config.vocab_size, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, H], normed -> logits fp32 [V]."""
        weight = self.lm_head.weight
        if weight.dtype == x.dtype:
            return F.linear(x, weight)[0].float()
        # A copy of the whole in x's dtype would be 2.3 GB, made anew for each token.
        return torch.cat([F.linear(x, rows.to(x.dtype))[0].float() for rows in weight.split(_ROWS)])


def head_bytes(config: EncoderConfig) -> int:
    """Bytes of the head on a GPU."""
    return 2 * config.hidden_size * (config.vocab_size + 1)


@contextmanager
def loaded_head(
    text: TextEncoder, device: torch.device, on_piece: OnPiece | None = None
) -> Iterator[LanguageHead]:
    """The head on ``device`` meanwhile; on the CPU it stays mapped from the file.

    ``text.beside`` counts it. ``on_piece(done, total)`` may raise to cancel. Raises CheckpointError where the
    file has none.
    """
    head = LanguageHead(text.file.config, dtype=torch.bfloat16, device="meta").eval()
    text.file.load_head(head, torch.bfloat16)
    try:
        if device != torch.device("cpu"):
            text.beside = head_bytes(text.file.config)
            for layer in (head.norm, head.lm_head):
                layer.weight = nn.Parameter(_moved(layer.weight, device, on_piece), requires_grad=False)
        yield head
    finally:
        text.beside = 0
        head.to("meta")  # whoever still holds the module holds no memory


def _moved(weight: Tensor, device: torch.device, on_piece: OnPiece | None) -> Tensor:
    result = torch.empty_like(weight, device=device)
    for start in range(0, len(weight), _ROWS):
        result[start : start + _ROWS].copy_(weight[start : start + _ROWS])
        if on_piece is not None:
            on_piece(min(start + _ROWS, len(weight)), len(weight))
    return result
