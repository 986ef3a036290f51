"""Prompt to token ids, with the real GPT-OSS tokenizer or any that has the harmony specials.

Control tokens typed by a user (``<|end|>``) are encoded as ordinary text: the reference parses
them, which lets a prompt break out of the template. A prompt is cut at 393 tokens so that the
suffix, the only tokens that see the whole prompt, stays within the trained 512; the reference cuts
the suffix instead.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from ..errors import CheckpointError
from .template import prefix_text, suffix_text

log = logging.getLogger(__name__)

MAX_TOKENS = 512
_NEEDED = ("<|start|>", "<|message|>", "<|end|>", "<|channel|>")


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of template and prompt, and how many of them come before the prompt."""

    ids: tuple[int, ...]
    prefix_length: int


class PromptTokenizer:
    """Wraps a ``tokenizers.Tokenizer``; the template's ids are computed once."""

    def __init__(self, tokenizer: Tokenizer, source: str = "tokenizer") -> None:
        lacking = [token for token in _NEEDED if tokenizer.token_to_id(token) is None]
        if lacking:
            raise CheckpointError(
                f"{source} has no token {', '.join(lacking)}: expected GPT-OSS's tokenizer "
                "(o200k_harmony). Use the tokenizer.json that comes with gpt-oss-20b or with Lens."
            )
        self.tokenizer = tokenizer
        self.prefix = self._template(prefix_text())
        self.suffix = self._template(suffix_text())

    @classmethod
    def from_json(cls, text: str, source: str = "tokenizer") -> PromptTokenizer:
        """Read the content of a tokenizer.json; ``source`` names it in errors."""
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(
                f"{source} is not a tokenizer.json ({error}). Download the file again."
            ) from error
        return cls(tokenizer, source)

    @property
    def max_prompt_tokens(self) -> int:
        """Prompt tokens that fit beside the template: 393 with GPT-OSS's tokenizer."""
        return MAX_TOKENS - len(self.prefix) - len(self.suffix)

    def __call__(self, prompt: str) -> PromptTokens:
        """Ids of template and prompt; a longer prompt is cut, with one warning that has the count."""
        ids = self.encode(prompt)
        if len(ids) > self.max_prompt_tokens:
            log.warning(
                "The prompt has %d tokens; the last %d do not fit and are ignored (at most %d).",
                len(ids),
                len(ids) - self.max_prompt_tokens,
                self.max_prompt_tokens,
            )
            ids = ids[: self.max_prompt_tokens]
        return PromptTokens((*self.prefix, *ids, *self.suffix), len(self.prefix))

    def encode(self, prompt: str) -> list[int]:
        """Ids of the prompt alone; control tokens in it are plain text."""
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(prompt, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _template(self, text: str) -> tuple[int, ...]:
        self.tokenizer.encode_special_tokens = False
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
