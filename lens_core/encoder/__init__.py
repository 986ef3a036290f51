"""Token ids to text features."""

from .features import encode_prompt, no_features
from .gpt_oss import GptOssEncoder

__all__ = ["GptOssEncoder", "encode_prompt", "no_features"]
