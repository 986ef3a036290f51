"""Picture sizes: the reference's buckets, the training buckets, and what else works.

Ratios are named width:height, sizes are (height, width) in pixels. Base 1024 and 1440 are the
reference's 18 buckets. 512 and 768 are the other areas of the training; of those the paper names
only the extreme and the square sizes, the others here are the exact ratio nearest in area (9:16 at
512 has none: nearest multiple of 16). Any multiple of 16 between 1:2 and 2:1 generalises. 256 is
the nano model's, which was trained with these nine sizes; the published checkpoints were not.
"""

from __future__ import annotations

from ..config import PIXELS_PER_TOKEN
from ..errors import SettingError, SizeError

Size = tuple[int, int]

ASPECT_RATIOS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")
_HEIGHT_WIDTH = {
    256: ((352, 176), (336, 192), (320, 208), (304, 224), (256, 256)),
    512: ((704, 352), (688, 384), (624, 416), (576, 432), (512, 512)),
    768: ((1088, 544), (1024, 576), (960, 640), (896, 672), (768, 768)),
    1024: ((1472, 736), (1376, 768), (1248, 832), (1152, 864), (1024, 1024)),
    1440: ((2080, 1040), (1936, 1088), (1760, 1168), (1616, 1216), (1440, 1440)),
}
# Landscape sizes mirror the portrait ones.
BUCKETS: dict[int, dict[str, Size]] = {
    base: dict(zip(ASPECT_RATIOS, [*tall, *((w, h) for h, w in tall[-2::-1])], strict=True))
    for base, tall in _HEIGHT_WIDTH.items()
}
BASE_RESOLUTIONS = tuple(BUCKETS)
_SMALLEST_PUBLISHED = 512


def bucket(base_resolution: int, aspect_ratio: str) -> Size:
    """(height, width) of a named bucket."""
    if base_resolution not in BUCKETS:
        known = ", ".join(map(str, BASE_RESOLUTIONS))
        raise SettingError(f"base_resolution must be one of {known}, got {base_resolution}.")
    if aspect_ratio not in ASPECT_RATIOS:
        known = ", ".join(ASPECT_RATIOS)
        raise SettingError(f"aspect_ratio must be one of {known}, got {aspect_ratio!r}.")
    return BUCKETS[base_resolution][aspect_ratio]


def bucket_like(base_resolution: int, height: int, width: int) -> Size:
    """The bucket of a base nearest in shape to a picture of any size."""
    _check_picture(height, width)
    sizes = [bucket(base_resolution, ratio) for ratio in ASPECT_RATIOS]

    def distance(size: Size) -> float:
        shape = size[0] * width / (size[1] * height)
        return max(shape, 1 / shape)

    return min(sizes, key=distance)


def nearest_bucket(height: int, width: int) -> Size:
    """The bucket of the published checkpoints nearest in shape, then in area, to any size."""
    _check_picture(height, width)

    def distance(size: Size) -> tuple[float, float]:
        h, w = size
        shape, area = (h / w) / (height / width), (h * w) / (height * width)
        # Buckets of one name differ in ratio by up to 1 % over the bases; steps of 4 % call them equal.
        return round(25 * max(shape, 1 / shape)), max(area, 1 / area)

    published = (sizes for base, sizes in BUCKETS.items() if base >= _SMALLEST_PUBLISHED)
    return min((size for sizes in published for size in sizes.values()), key=distance)


def check_size(height: int, width: int) -> None:
    """Raise SizeError, with the nearest size that works, for one that does not."""
    unit = PIXELS_PER_TOKEN
    if height < unit or width < unit or height % unit or width % unit:
        reason = f"both sides must be multiples of {unit}"
    elif _drawable(height, width):
        return
    else:
        reason = "this is beyond the ratios 1:2 to 2:1 that Lens can draw"
    h, w = (max(unit, round(side / unit) * unit) for side in (height, width))
    if not _drawable(h, w):
        h, w = nearest_bucket(max(height, 1), max(width, 1))
    raise SizeError(f"{width}x{height} pixels: {reason}. Try {w}x{h}.")


def _check_picture(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise SizeError(f"A picture needs a positive size, got {width}x{height}.")


def _drawable(height: int, width: int) -> bool:
    return max(height, width) <= 2 * min(height, width)


def token_grid(height: int, width: int) -> tuple[int, int]:
    """(h, w) in image tokens of a size in pixels; raises SizeError."""
    check_size(height, width)
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
