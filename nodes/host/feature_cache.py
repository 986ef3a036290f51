"""Text features kept below ComfyUI's user folder, where no request over HTTP reaches."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...lens_core.feature_cache import FeatureCache


def feature_cache() -> FeatureCache:
    """The pack's cache: ``user/__lens/features``, at most 1 GB."""
    return FeatureCache(Path(folder_paths.get_system_user_directory("lens")) / "features")


def free_features() -> int:
    """Delete all kept features; returns the bytes freed."""
    return feature_cache().clear()


def clear_features() -> str:
    """The same; returns what was freed, in words."""
    return f"{free_features() / 1e6:.1f} MB of text features deleted."
