"""Green, amber or red: at the published sizes, in the memory of usual GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lens_core.memory.plan import Component, Components
from lens_core.memory.verdict import NOTHING, Device, Verdict, judge, lighter, whole

GB = 10**9
# In bf16 at 1024 x 1024: 24 encoder layers, 48 blocks with their modulation.
ENCODER = Component((477_000_000,) * 24, 0, 100_000_000)
DENOISER = Component((113_000_000,) * 48, 72_000_000, 380_000_000, (56_600_000,) * 48)
BOTH = Components(ENCODER, DENOISER, NOTHING)
ALONE = Components(NOTHING, DENOISER, NOTHING)
INT8 = replace(DENOISER, layers=(57_000_000,) * 48)


def on_gpu(parts: Components, free: float, advice: tuple[str, ...] = ()) -> Verdict:
    return judge(parts, Device(free * GB, 24 * GB), "Of a picture.", advice)


@pytest.mark.parametrize(
    "parts, free, level, line",
    [
        (BOTH, 22.1, "green", "✓ 11.5 GB of 22.1 GB free"),
        (BOTH, 11.0, "amber", "! 11.5 GB of 11.0 GB free: streamed, slower"),
        (ALONE, 11.0, "green", "✓ 5.9 GB of 11.0 GB free"),
        (ALONE, 2.0, "amber", "! 5.9 GB of 2.0 GB free: streamed, slower"),
        (BOTH, 0.9, "red", "✗ 1.1 GB of 0.9 GB free: too little, even streamed"),
        (BOTH, -1.0, "red", "✗ 1.1 GB of 0.0 GB free: too little, even streamed"),
    ],
)
def test_on_a_gpu(parts: Components, free: float, level: str, line: str):
    verdict = on_gpu(parts, free)
    assert (verdict.level, verdict.line) == (level, line)
    assert verdict.least <= verdict.needed == whole(parts)


def test_the_limits_are_exact():
    needed, least = on_gpu(BOTH, 20).needed, on_gpu(BOTH, 20).least
    levels = [judge(BOTH, Device(free, 1e12), "").level for free in (needed, needed - 1, least, least - 1)]
    assert levels == ["green", "amber", "amber", "red"]


def test_details_say_what_the_figures_are():
    assert on_gpu(BOTH, 22.1, ("Choose less.",)).details == (
        "Of a picture.",
        "One model on the GPU at a time: 11.5 GB (encoding 11.5, sampling 5.9).",
        "All of them staying there: 20.0 GB. Streamed by layers: 1.1 GB.",
        "22.1 GB of 24.0 GB are free for models.",
    )
    assert on_gpu(ALONE, 0.1, ("Choose less.",)).details[-1] == "Choose less."
    assert "encoding" not in " ".join(on_gpu(ALONE, 20).details)


@pytest.mark.parametrize(
    "free, total, level, line",
    [
        (30, 32, "green", "✓ CPU: needs about 20.0 GB of 32.0 GB memory"),
        (10, 32, "amber", "! CPU: needs about 20.0 GB of 32.0 GB memory: more than is free now"),
        (10, 16, "red", "✗ CPU: needs about 20.0 GB of 16.0 GB memory: too little"),
    ],
)
def test_on_a_cpu_all_of_it_is_in_memory(free: float, total: float, level: str, line: str):
    verdict = judge(BOTH, Device(free * GB, total * GB, is_cpu=True), "")
    assert (verdict.level, verdict.line) == (level, line)


def test_the_first_lighter_denoiser_that_fits_is_proposed():
    denoisers = {"int8_dynamic": INT8, "uint4_sdnq": replace(INT8, layers=(33_000_000,) * 48)}
    assert lighter(ALONE, denoisers, 4 * GB) == "int8_dynamic"
    assert lighter(ALONE, denoisers, 2.5 * GB) == "uint4_sdnq"
    assert lighter(ALONE, denoisers, 1 * GB) is None
    assert lighter(BOTH, denoisers, 4 * GB) is None, "the encoder is what is too large"
