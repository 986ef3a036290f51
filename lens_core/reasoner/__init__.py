"""The prompt reasoner: a language model rewrites a short request into a prompt worth drawing."""

from .presets import PRESETS, insist, request
from .quotes import missing, quoted
from .rewrite import Rewritten, rewrite

__all__ = ["PRESETS", "Rewritten", "insist", "missing", "quoted", "request", "rewrite"]
