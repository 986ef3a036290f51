"""User text to token ids."""

from .tokenizer import PromptTokenizer, PromptTokens

__all__ = ["PromptTokenizer", "PromptTokens"]
