"""Where a model's layers lie, and how they get to where they run."""

from .layers import LayerStore
from .pinned import available_ram

__all__ = ["LayerStore", "available_ram"]
