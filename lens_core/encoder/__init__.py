"""Token ids to text features."""

from .features import PrefixCache, encode_prompts, no_features
from .gpt_oss import GptOssEncoder, GptOssLayer

__all__ = ["GptOssEncoder", "GptOssLayer", "PrefixCache", "encode_prompts", "no_features"]
