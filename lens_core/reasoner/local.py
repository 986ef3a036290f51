"""A prompt rewritten by the text encoder's own weights: no second model, and no second copy of any expert."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .. import harmony
from ..errors import SettingError
from ..harmony import CHANNEL, FINAL, MESSAGE, Conversation, Parser, Reply
from ..memory.estimate import encoder_bytes
from ..prompt import PromptTokenizer
from ..text_encoder import TextEncoder
from .generate import Decoder, OnLayer, tokens
from .head import LanguageHead, OnPiece, head_bytes, loaded_head
from .kv_cache import cache_bytes
from .presets import request
from .rewrite import Rewritten, rewrite
from .sampling import Sampler, Sampling

log = logging.getLogger(__name__)

# "none" begins the answer at once, without any analysis; the reference reasons with "low".
EFFORTS = ("none", *harmony.EFFORTS)
OnText = Callable[[Reply, int], None]
# A retry's reminder adds these tokens to the instructions, and at most the prompt's own once more.
_REMINDER_TOKENS = 64
# fp32 numbers of each word at once while a token is drawn: logits, scaled, masked, their chances, sorted.
_LOGITS = 6


@dataclass(frozen=True)
class LocalOptions:
    """How to write; raises SettingError where a value is out of its range."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 4096
    effort: str = "low"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.effort not in EFFORTS:
            raise SettingError(f"effort must be one of {', '.join(EFFORTS)}, got {self.effort!r}.")


def rewrite_locally(
    text: TextEncoder,
    prompt: str,
    preset: str,
    device: torch.device,
    options: LocalOptions,
    *,
    on_text: OnText | None = None,
    on_layer: OnLayer | None = None,
    on_piece: OnPiece | None = None,
) -> Rewritten:
    """``prompt`` rewritten by the rules of ``preset``, with quoted text kept or a warning.

    ``on_text(reply, tokens so far)`` is called after each token, ``on_layer`` after each layer and
    ``on_piece`` while the head is loaded; any may raise to cancel. Raises CheckpointError where the file has
    no lm_head.
    """
    if not prompt.strip():
        return rewrite(prompt, preset, lambda _: "")
    with loaded_head(text, device, on_piece) as head:
        writer = _Writer(text, head, device, options, on_text, on_layer)
        result = rewrite(prompt, preset, writer)
    if writer.cut:
        limit = f"The answer was cut at {options.max_new_tokens} tokens: raise max_new_tokens."
        result = replace(result, warning=f"{limit} {result.warning}".strip())
    return result


def working_bytes(text: TextEncoder, prompt: str, preset: str, options: LocalOptions) -> int:
    """Bytes that rewriting takes on a GPU beside the layers and their buffers, the head included."""
    config = text.file.config
    count = len(_rendered(request(preset, prompt), text.file.tokenizer, options.effort))
    count += text.file.tokenizer.count(prompt) + _REMINDER_TOKENS
    logits = 4 * _LOGITS * config.vocab_size
    cache = cache_bytes(config, count + options.max_new_tokens, text.dtype)
    return head_bytes(config) + cache + encoder_bytes(count) + logits


@dataclass
class _Writer:
    """Answers a conversation; ``cut``: the last answer was not finished."""

    text: TextEncoder
    head: LanguageHead
    device: torch.device
    options: LocalOptions
    on_text: OnText | None
    on_layer: OnLayer | None
    cut: bool = False

    def __call__(self, conversation: Conversation) -> str:
        codec = self.text.file.tokenizer
        parser, reply = Parser(codec), Reply("", "", False)
        for token in _opening(codec, self.options.effort):
            parser.feed(token)
        ids = _rendered(conversation, codec, self.options.effort)
        sampler = Sampler(self.options.sampling, self.device, _words(codec))
        decoder = Decoder(self.text, self.head, self.device, self.on_layer)
        for count, token in enumerate(tokens(decoder, ids, sampler, self.options.max_new_tokens), 1):
            reply = parser.feed(token)
            if self.on_text is not None:
                self.on_text(reply, count)
            if reply.done:
                break
        self.cut = not reply.done
        return parser.answer


def _rendered(conversation: Conversation, codec: PromptTokenizer, effort: str) -> list[int]:
    named = harmony.EFFORTS[0] if effort == "none" else effort
    return harmony.render(conversation, codec, named) + _opening(codec, effort)


def _opening(codec: PromptTokenizer, effort: str) -> list[int]:
    """What of the answer is given: where it is to have no analysis, the header of the final message."""
    return harmony.ids_of([CHANNEL, FINAL, MESSAGE], codec) if effort == "none" else []


def _words(codec: PromptTokenizer) -> int:
    """How many ids there are tokens for; GPT-OSS has logits for a thousand more, which mean nothing."""
    last = codec.token_to_id("<|endofprompt|>")
    return codec.tokenizer.get_vocab_size() if last is None else last + 1
