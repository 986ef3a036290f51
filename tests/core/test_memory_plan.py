"""Plans at the published sizes: what fits in which budget, and what is given up first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lens_core.memory.plan import Component, Components, Plan, choose
from lens_core.memory.recovery import OutOfMemory
from lens_core.needs import largest_below

GB = 10**9
# Lens in bf16 at 1440 x 1440: 24 encoder layers, 48 blocks with their modulation, the VAE.
PARTS = Components(
    encoder=Component((477_000_000,) * 24, 0, 100_000_000),
    denoiser=Component((113_000_000,) * 48, 72_000_000, 380_000_000, (56_600_000,) * 48),
    vae=Component((), 168_000_000, 1_900_000_000),
)
WHOLE = Plan(24, 48, True, True, True)


def test_everything_stays_where_there_is_room():
    assert choose(PARTS, 30 * GB) == WHOLE
    assert choose(PARTS, 30 * GB, "none") == WHOLE


def test_the_modulation_goes_first():
    """1440 x 1440 in bf16, all three resident, in a 24 GB card's memory."""
    plan = choose(PARTS, 20 * GB)
    assert plan == replace(WHOLE, modulation=False)
    assert plan.peak(PARTS) < 20 * GB


def test_then_the_encoder_after_encoding():
    plan = choose(PARTS, 16 * GB)
    assert plan == replace(WHOLE, keep_encoder=False)


def test_then_layers_are_streamed_while_encoding():
    plan = choose(PARTS, 8 * GB)
    assert 0 < plan.encoder_layers < 24 and plan.denoiser_layers == 48 and not plan.keep_encoder
    more = replace(plan, encoder_layers=plan.encoder_layers + 1)
    assert plan.peak(PARTS) <= 8 * GB < more.peak(PARTS)


def test_then_the_denoisers():
    plan = choose(PARTS, 4 * GB)
    assert 0 < plan.denoiser_layers < 48
    assert choose(PARTS, 2.2 * GB).denoiser_layers < plan.denoiser_layers


@pytest.mark.parametrize("budget", [2.1, 3, 4, 6, 8, 10, 12, 16, 20, 24, 30])
@pytest.mark.parametrize("offload", ["auto", "none", "model", "stream"])
def test_no_plan_exceeds_its_budget(budget: float, offload: str):
    try:
        plan = choose(PARTS, budget * GB, offload)
    except OutOfMemory:
        assert offload != "auto"
        return
    assert max(plan.peaks(PARTS).values()) <= budget * GB


def test_less_memory_never_means_a_larger_plan():
    peaks = [choose(PARTS, budget * GB / 10).peak(PARTS) for budget in range(21, 300)]
    assert all(peak <= budget * GB / 10 for peak, budget in zip(peaks, range(21, 300), strict=True))


def test_streams_only_if_asked():
    assert choose(PARTS, 30 * GB, "stream") == Plan(0, 0, False, False, False)
    model = choose(PARTS, 30 * GB, "model")
    assert (model.keep_encoder, model.keep_denoiser, model.encoder_layers) == (False, False, 24)


def test_what_does_not_fit_is_told_with_figures():
    with pytest.raises(
        OutOfMemory, match=r"decoding takes 2\.1 GB at least.* 1\.0 GB are there.*smaller picture"
    ):
        choose(PARTS, GB)
    with pytest.raises(
        OutOfMemory, match=r"--offload none, and 12\.0 GB are there\. Leave --offload at auto"
    ):
        choose(PARTS, 12 * GB, "none")
    with pytest.raises(OutOfMemory, match=r"encoding takes 11\.5 GB.*--encoder_placement cpu"):
        choose(PARTS, 5 * GB, "model")
    sampling = replace(PARTS, encoder=Component(()))
    with pytest.raises(OutOfMemory, match=r"sampling takes .*--quant_transformer int8_dynamic"):
        choose(sampling, 5 * GB, "model")


def test_a_plan_in_words():
    text = choose(PARTS, 8 * GB).describe(PARTS)
    assert "of 24 layers resident, others streamed, leaves after encoding" in text
    assert "denoiser resident, modulation streamed once" in text
    assert "GB at most: encoding" in text


def test_phases_add_up_what_is_there():
    peaks = WHOLE.peaks(PARTS)
    held = 24 * 477_000_000 + 48 * 113_000_000 + 72_000_000 + 48 * 56_600_000 + 168_000_000
    assert peaks["sampling"] == held + 380_000_000
    assert peaks["decoding"] == held + 1_900_000_000
    streamed = Plan(0, 0, False, False, False).peaks(PARTS)
    assert streamed["encoding"] == 2 * 477_000_000 + 100_000_000
    assert streamed["sampling"] == 168_000_000 + 72_000_000 + 2 * 113_000_000 + 380_000_000


def test_the_size_that_fits_is_told_where_the_size_is_the_matter():
    with pytest.raises(OutOfMemory, match=r"decoding takes .* Pictures of up to 64x64 fit\."):
        choose(PARTS, GB, smaller=lambda: "Pictures of up to 64x64 fit.")


@pytest.mark.parametrize(
    ("limit", "size"), [(1e9, (1424, 720)), (500 * 300, (544, 272)), (16 * 16, (16, 16)), (1, None)]
)
def test_the_largest_size_below(limit: float, size: tuple[int, int] | None):
    assert largest_below(1440, 736, lambda height, width: height * width <= limit) == size
