"""Prompt to token ids, with the real GPT-OSS tokenizer or any that has the harmony specials.

Control tokens typed by a user (``<|end|>``) are encoded as ordinary text: the reference parses
them, which lets a prompt break out of the template. A prompt is cut at 393 tokens so that the
suffix, the only tokens that see the whole prompt, stays within the trained 512; the reference cuts
the suffix instead. The cut falls between words, and the ids are always those of the kept text: the
first ids of the whole prompt may be another spelling of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer, models

from .. import harmony
from ..config import TEMPLATE_DATE
from ..errors import CheckpointError, LensError, SettingError
from . import template
from .template import PREFIX_MESSAGES

log = logging.getLogger(__name__)

MAX_TOKENS = 512
# A cut looks for the end of a word among this many tokens; text without spaces is cut where it is full.
CUT_WINDOW = 64
# GPT-OSS splits text by a pattern, then into bytes.
_MOST_STEPS = 3


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of template and prompt, and what of the prompt is in them.

    The prompt's own ids are ``ids[prefix_length : prefix_length + prompt_length]``. Of a prompt that
    did not fit, ``cut`` tokens, the text ``dropped``, are not in there.
    """

    ids: tuple[int, ...]
    prefix_length: int
    prompt_length: int
    cut: int = 0
    dropped: str = ""


class PromptTokenizer:
    """Wraps a ``tokenizers.Tokenizer``; the template's ids are computed once per date."""

    def __init__(self, tokenizer: Tokenizer, source: str = "tokenizer") -> None:
        lacking = [token for token in harmony.NEEDED if tokenizer.token_to_id(token) is None]
        if lacking:
            raise CheckpointError(
                f"{source} has no token {', '.join(lacking)}: expected GPT-OSS's tokenizer "
                "(o200k_harmony). Use the tokenizer.json that comes with gpt-oss-20b or with Lens."
            )
        _check_parts(tokenizer, source)
        # Once and for all, so that no thread ever finds it off while it encodes a prompt.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._prefixes = lru_cache(maxsize=8)(lambda date: tuple(harmony.ids_of(template.prefix(date), self)))
        with library_errors(source):
            self.prefix = self.prefix_ids()
            self.suffix = tuple(harmony.ids_of(template.suffix(), self))

    @classmethod
    def from_json(cls, text: str, source: str = "tokenizer") -> PromptTokenizer:
        """Read the content of a tokenizer.json; ``source`` names it in errors."""
        with library_errors(source):
            tokenizer = Tokenizer.from_str(text)
        return cls(tokenizer, source)

    @property
    def max_prompt_tokens(self) -> int:
        """Prompt tokens that fit beside the template: 393 with GPT-OSS's tokenizer."""
        return self._room(self.prefix)

    def __call__(self, prompt: str, *, extended: bool = False, date: str = TEMPLATE_DATE) -> PromptTokens:
        """Ids of template and prompt, which are always those of the kept text, tokenised alone.

        A prompt above ``max_prompt_tokens`` is cut between words with one warning, unless
        ``extended`` lets it through. ``date`` (YYYY-MM-DD) goes into the system message; a malformed
        one raises SettingError.
        """
        prefix = self.prefix_ids(date)
        prompt = harmony.valid_text(prompt)
        kept, ids = prompt, self.encode(prompt)
        total, room = len(ids), self._room(prefix)
        # Once in practice; again only where the kept text alone takes more tokens than within the whole.
        while len(ids) > room and not extended:
            kept = self._start(kept, ids, room)
            ids = self.encode(kept)
        dropped = prompt[len(kept) :]
        if dropped:
            _warn_of_cut(total, room, total - len(ids), dropped)
        return PromptTokens(
            (*prefix, *ids, *self.suffix), len(prefix), len(ids), max(total - len(ids), 0), dropped
        )

    def prefix_ids(self, date: str = TEMPLATE_DATE) -> tuple[int, ...]:
        """Ids of everything before the prompt with ``date`` in it; SettingError if that is no date."""
        return self._prefixes(date)

    def split(self, ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The constant prefix and the rest (prompt and suffix) of a whole chat's ids.

        The prefix ends with its third ``<|message|>``. No prompt can move that: it comes later, and
        control tokens in it are plain text. Raises SettingError where there is no third one.
        """
        message = self.tokenizer.token_to_id("<|message|>")
        found = [index for index, token in enumerate(ids) if token == message]
        if len(found) < PREFIX_MESSAGES:
            raise SettingError(
                f"These {len(ids)} tokens are no Lens chat: expected {PREFIX_MESSAGES} <|message|> tokens "
                f"(id {message}) before the prompt, found {len(found)}. Tokenise the prompt with this "
                "text encoder's own tokenizer."
            )
        end = found[PREFIX_MESSAGES - 1] + 1
        return tuple(ids[:end]), tuple(ids[end:])

    def count(self, prompt: str) -> int:
        """Tokens of the whole prompt, the part that would be cut included."""
        return len(self.encode(prompt))

    def encode(self, prompt: str) -> list[int]:
        """Ids of the prompt alone; control tokens in it are plain text."""
        return self.tokenizer.encode(harmony.valid_text(prompt), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a control token, if there is one."""
        return self.tokenizer.token_to_id(token)

    def _room(self, prefix: Sequence[int]) -> int:
        return max(MAX_TOKENS - len(prefix) - len(self.suffix), 0)

    def _start(self, prompt: str, ids: list[int], room: int) -> str:
        """The start of ``prompt`` that at most ``room`` of its ids spell: up to the last end of a word
        among the last CUT_WINDOW of them, or else up to the last whole character."""
        full = ""
        for length in range(room, 0, -1):
            text = self.decode(ids[:length])
            if not prompt.startswith(text) or len(text) == len(prompt):
                continue  # ends inside a character, which decodes to U+FFFD (perhaps the prompt's own)
            if text[-1].isspace() or prompt[len(text)].isspace():
                return text.rstrip()  # no prompt that a person writes ends in a blank token
            full = full or text
            if room - length >= CUT_WINDOW:
                break
        return full


@contextmanager
def library_errors(source: str) -> Iterator[None]:
    """Turns what the tokenizers package raises at a file into a CheckpointError: bare Exceptions, and its
    panics, which no ``except Exception`` stops and which would end a server's thread."""
    try:
        yield
    except LensError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{source} is not a tokenizer.json that works ({error}). Download the file again."
        ) from error


def _check_parts(tokenizer: Tokenizer, source: str) -> None:
    """Raise CheckpointError for parts that GPT-OSS's tokenizer has not: some, made to, turn a prompt into
    gigabytes."""
    steps = json.loads(tokenizer.pre_tokenizer.__getstate__()) if tokenizer.pre_tokenizer else {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if (
        tokenizer.normalizer is not None
        or not isinstance(tokenizer.model, models.BPE)
        or len(kinds) > _MOST_STEPS
        or not {*kinds} <= {"Split", "ByteLevel"}
    ):
        raise CheckpointError(
            f"{source} is of another kind than GPT-OSS's tokenizer (o200k_harmony). Use the tokenizer.json "
            "that comes with gpt-oss-20b or with Lens."
        )


def _warn_of_cut(total: int, room: int, cut: int, dropped: str) -> None:
    words = " ".join(dropped.split()[:8])[:80]
    log.warning(
        'The prompt has %d tokens and at most %d fit: the last %d are left out, beginning with "%s".',
        total,
        room,
        cut,
        words,
    )
