"""Text features kept below ComfyUI's user folder, where no request over HTTP reaches."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from torch import Tensor

from ...lens_core.feature_cache import FeatureCache
from .user_settings import number

_LIMIT = "Lens.FeatureCacheGB"
_MOST_GB = 1000.0


class _LimitedCache(FeatureCache):
    """As large as the page's settings allow when features are put in."""

    def put(self, key: str, features: Tensor) -> None:
        """As FeatureCache's; at a limit of 0 nothing is kept, of what was there neither."""
        self.max_bytes = int(number(_LIMIT, usual=1.0, most=_MOST_GB) * 2**30)
        if self.max_bytes:
            super().put(key, features)
        else:
            self.clear()


def feature_cache() -> FeatureCache:
    """The pack's cache: ``user/__lens/features``, of 1 GB unless the page's settings say otherwise."""
    return _LimitedCache(Path(folder_paths.get_system_user_directory("lens")) / "features")


def free_features() -> int:
    """Delete all kept features; returns the bytes freed."""
    return feature_cache().clear()


def clear_features() -> str:
    """The same; returns what was freed, in words."""
    return f"{free_features() / 1e6:.1f} MB of text features deleted."
