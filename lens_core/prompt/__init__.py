"""User text to token ids."""

from .template import check_date, today
from .tokenizer import PromptTokenizer, PromptTokens

__all__ = ["PromptTokenizer", "PromptTokens", "check_date", "today"]
