"""LoRA files of every spelling: which layers they name, and what they make of these layers' weights."""

from .file import LoraFile, Matched, open_lora

__all__ = ["LoraFile", "Matched", "open_lora"]
