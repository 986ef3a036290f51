"""Token ids to text features."""

from .features import PrefixCache, encode_prompts, no_features
from .gpt_oss import GptOssEncoder, GptOssLayer
from .moe import PackedExperts

__all__ = [
    "GptOssEncoder",
    "GptOssLayer",
    "PackedExperts",
    "PrefixCache",
    "encode_prompts",
    "no_features",
]
