"""GPT-OSS's tokenizer rebuilt from a GGUF's metadata, for a file that has no tokenizer.json beside it.

A GGUF has the vocabulary, the merges and which tokens are control tokens, but of the pre-tokenizer only
a name. GPT-OSS's is o200k's pattern, so that is what is built, whatever the name.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ..errors import CheckpointError
from .gguf import GgufCheckpoint

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# o200k_base's split, from tiktoken's definition of that encoding.
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def tokenizer_of(checkpoint: GgufCheckpoint) -> Tokenizer | None:
    """The tokenizer in a GGUF's metadata, or None where it has none of byte-level BPE."""
    tokens = checkpoint.strings("tokenizer.ggml.tokens")
    merges = checkpoint.strings("tokenizer.ggml.merges")
    if checkpoint.metadata.get("tokenizer.ggml.model") != "gpt2" or not tokens or not merges:
        return None
    kinds = checkpoint.numbers("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{checkpoint.name} is damaged: its tokenizer has {len(tokens):,} tokens and the kinds of "
            f"{len(kinds):,}. Download it again."
        )
    # The rows of the embedding that pad it to a round size are named, and marked as unused.
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != _UNUSED}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_O200K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer
