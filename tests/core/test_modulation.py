"""The modulation bank: right, evaluated as rarely as it can be, and never larger than it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.config import is_modulation
from lens_core.denoiser import DenoiserRun, LensDenoiser
from lens_core.denoiser import modulation as module
from lens_core.denoiser.modulation import Modulation, ModulationBank, modulation_bytes
from lens_core.loading import load_denoiser
from lens_core.sampling import sigmas
from tests.compare import relative_l2
from tests.reference import straight_line

# fp32: a matrix product of many rows adds in another order than one of a single row, 1e-7 in the mean.
REORDERED = 1e-6
# The oracle's angles and ours differ by 3e-5 near 1000 radians: see test_denoiser.py.
FP32 = 1e-5
LEVELS = sigmas(20, 15)[:-1].tolist()


def evaluated(denoiser: LensDenoiser) -> dict[str, list[int]]:
    """Rows of every evaluation from now on, by the linears that depend on the noise level alone."""
    calls: dict[str, list[int]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: calls[name].append(len(args[0]))

    for name, layer in denoiser.named_modules():
        of_level = is_modulation(name) or name.startswith(("time_text_embed", "norm_out.linear"))
        if of_level and isinstance(layer, nn.Linear):
            calls[name] = []
            layer.register_forward_pre_hook(note(name))
    assert len(calls) == 2 * len(denoiser.blocks) + 3
    return calls


def at(bank: ModulationBank | DenoiserRun, denoiser: LensDenoiser, *levels: float) -> Modulation:
    look_up = bank.at if isinstance(bank, ModulationBank) else bank.modulation
    return look_up(denoiser, torch.tensor(levels), torch.float32)


def alone(denoiser: LensDenoiser, level: float) -> Modulation:
    """The level's modulation by the layers themselves."""
    temb = denoiser.embed_sigma(torch.tensor([level]), torch.float32)
    rows = [torch.stack([block.img_mod(temb)[0], block.txt_mod(temb)[0]]) for block in denoiser.blocks]
    return Modulation(temb, torch.stack(rows)[None], denoiser.norm_out.table(temb))


def assert_equal(got: Modulation, want: list[Modulation]) -> None:
    for index, one in enumerate(want):
        for table, expected in zip(got, one, strict=True):
            assert table.shape[1:] == expected.shape[1:] and len(table) == len(want)
            assert relative_l2(table[index], expected[0]) < REORDERED


def test_the_bank_equals_direct_evaluation(denoiser: LensDenoiser):
    bank = ModulationBank(LEVELS)
    for level in LEVELS:
        assert_equal(at(bank, denoiser, level), [alone(denoiser, level)])


def test_a_level_on_demand_equals_direct_evaluation_bit_for_bit(denoiser: LensDenoiser):
    got, want = at(ModulationBank(), denoiser, 0.37), alone(denoiser, 0.37)
    assert all(torch.equal(table, expected) for table, expected in zip(got, want, strict=True))


@pytest.mark.parametrize("level", [LEVELS[0], LEVELS[7], LEVELS[-1]])
def test_tables_equal_the_oracles(denoiser: LensDenoiser, oracle: straight_line.Model, level: float):
    """Each block's image and text, in that order."""
    frequencies = torch.exp(-torch.arange(128, dtype=torch.float64) / 128 * torch.tensor(1e4).double().log())
    angle = 1000 * level * frequencies
    weights, at_name = oracle["denoiser"], "time_text_embed.timestep_embedder.linear_"
    temb = straight_line.linear(weights, at_name + "1", torch.cat([angle.cos(), angle.sin()]).float())
    temb = straight_line.linear(weights, at_name + "2", F.silu(temb))
    bank = ModulationBank(LEVELS)
    at(bank, denoiser, LEVELS[0])
    tables = at(bank, denoiser, level).tables()
    assert len(tables) == len(denoiser.blocks)
    for index, pair in enumerate(tables):
        for stream, table in zip(("img", "txt"), pair, strict=True):
            name = f"transformer_blocks.{index}.{stream}_mod.1"
            assert table.shape == (1, 6 * denoiser.config.hidden_size)
            assert relative_l2(table[0], straight_line.linear(weights, name, F.silu(temb))) < FP32


def test_a_runs_levels_are_evaluated_in_one_go(denoiser: LensDenoiser):
    calls, run = evaluated(denoiser), DenoiserRun(LEVELS)
    for level in LEVELS:
        at(run, denoiser, level, level)
    assert set(map(tuple, calls.values())) == {(20,)}


def test_a_run_that_begins_late_evaluates_what_is_left(denoiser: LensDenoiser):
    """Image to image starts somewhere in the schedule."""
    calls, bank = evaluated(denoiser), ModulationBank(LEVELS)
    for level in LEVELS[12:]:
        at(bank, denoiser, level)
    assert set(map(tuple, calls.values())) == {(8,)}


def test_a_level_off_the_plan_is_evaluated_once_and_kept(denoiser: LensDenoiser):
    calls, bank = evaluated(denoiser), ModulationBank(LEVELS)
    for level in (0.123, LEVELS[0], 0.123, LEVELS[5], 0.456, 0.456, LEVELS[19], 0.123):
        assert_equal(at(bank, denoiser, level), [alone_quietly(denoiser, calls, level)])
    assert set(map(tuple, calls.values())) == {(1, 20, 1)}


def alone_quietly(denoiser: LensDenoiser, calls: dict[str, list[int]], level: float) -> Modulation:
    """``alone``, and not counted."""
    before = {name: list(rows) for name, rows in calls.items()}
    found = alone(denoiser, level)
    for name, rows in before.items():
        calls[name][:] = rows
    return found


@pytest.mark.parametrize(
    "levels",
    [
        (LEVELS[3], LEVELS[1], LEVELS[3]),
        (LEVELS[3], 0.123),
        (0.123, LEVELS[3]),
        (0.123, 0.456, 0.123),
        (0.123,) * 3,
    ],
)
def test_pictures_of_one_batch_at_levels_of_their_own(denoiser: LensDenoiser, levels: tuple[float, ...]):
    want = [alone(denoiser, level) for level in levels]
    bank = ModulationBank(LEVELS)
    for _ in range(2):
        assert_equal(at(bank, denoiser, *levels), want)
    at(bank, denoiser, LEVELS[0])
    assert_equal(at(bank, denoiser, *levels), want)


def test_levels_that_came_one_by_one_are_joined(denoiser: LensDenoiser):
    calls, bank = evaluated(denoiser), ModulationBank()
    want = [alone_quietly(denoiser, calls, level) for level in (0.3, 0.2, 0.3)]
    for level in (0.2, 0.3):
        at(bank, denoiser, level)
    assert_equal(at(bank, denoiser, 0.3, 0.2, 0.3), want)
    assert set(map(tuple, calls.values())) == {(1, 1)}


def test_one_level_for_all_pictures_is_not_copied(denoiser: LensDenoiser):
    bank = ModulationBank(LEVELS)
    first, second = at(bank, denoiser, LEVELS[2]), at(bank, denoiser, *3 * [LEVELS[2]])
    for one, three in zip(first, second, strict=True):
        assert three.shape[0] == 3 and three.stride(0) == 0 and three.data_ptr() == one.data_ptr()


def test_a_long_run_fills_the_table_again(denoiser: LensDenoiser):
    calls = evaluated(denoiser)
    levels = torch.linspace(1, 0.01, 150).tolist()
    bank = ModulationBank(levels)
    for level in levels:
        at(bank, denoiser, level)
    assert set(map(tuple, calls.values())) == {(64, 64, 22)}
    for index in (0, 63, 64, 149):
        assert_equal(at(bank, denoiser, levels[index]), [alone(denoiser, levels[index])])


def test_a_batch_of_more_levels_than_are_evaluated_at_once(denoiser: LensDenoiser):
    levels = torch.linspace(1, 0.01, 150).tolist()
    for bank in (ModulationBank(levels), ModulationBank()):
        got = at(bank, denoiser, *levels)
        for index in (0, 64, 149):
            assert relative_l2(got.blocks[index], alone(denoiser, levels[index]).blocks[0]) < REORDERED


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows in tables that someone holds; the tables are empty, so that thousands take no time."""
    rows: Counter[str] = Counter()

    class Table:
        def __init__(self, count: int) -> None:
            self.count = count
            rows["alive"] += count
            rows["most"] = max(rows["most"], rows["alive"])

        def at(self, _: list[int]) -> Table:
            return self

        def __del__(self) -> None:
            rows["alive"] -= self.count

    monkeypatch.setattr(module, "modulation", lambda _, sigma, dtype: Table(len(sigma)))
    return rows


@pytest.mark.parametrize("planned", [0, 20, 1000])
@pytest.mark.parametrize("order", [1, -1])
def test_thousands_of_levels_take_bounded_memory(alive: Counter[str], planned: int, order: int):
    """Twice what is evaluated at once, however many levels come in whatever order, planned or not; and the
    table that is being made."""
    plan = torch.linspace(1, 0.01, planned).tolist()
    others = torch.linspace(0.99, 0.02, 3000).tolist()
    bank: Any = ModulationBank(plan)
    for level in plan[::order] + others[::order]:
        at(bank, SimpleNamespace(), level)
    assert 64 <= alive["most"] <= 3 * 64


def test_each_precision_has_a_bank_of_its_own(tiny_folder: Path):
    run = DenoiserRun(LEVELS)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        denoiser = load_denoiser(tiny_folder, dtype)
        got = run.modulation(denoiser, torch.tensor(LEVELS[:1]), dtype)
        assert {table.dtype for table in got} == {dtype}


def test_what_counts_as_modulation(denoiser: LensDenoiser):
    layers = {name: layer for name, layer in denoiser.named_modules() if is_modulation(name)}
    hidden = denoiser.config.hidden_size
    assert len(layers) == 2 * len(denoiser.blocks)
    assert all(isinstance(layer, nn.Linear) for layer in layers.values())
    assert modulation_bytes(denoiser) == len(layers) * 6 * hidden * (hidden + 1) * 4


def test_nothing_is_kept_while_weights_are_trained(tiny_folder: Path):
    """They change from step to step, and each step's gradients need a graph of its own."""
    with torch.inference_mode(False), torch.enable_grad():
        denoiser, run = load_denoiser(tiny_folder, torch.float32).requires_grad_(True), DenoiserRun([0.5])
        linear: Any = denoiser.blocks[0].img_mod[1]
        for _ in range(3):
            sigma = torch.tensor([0.5], requires_grad=True)
            got = run.modulation(denoiser, sigma, torch.float32)
            assert torch.equal(got.blocks[:, 0, 0], denoiser.blocks[0].img_mod(got.temb))
            (got.blocks.sum() + got.out.sum()).backward()
            assert linear.weight.grad.abs().sum() > 0 and sigma.grad is not None
            with torch.no_grad():
                linear.weight += 1
                linear.weight.grad = None


def test_an_output_table_is_part_of_it(denoiser: LensDenoiser):
    got: Tensor = at(ModulationBank(LEVELS), denoiser, LEVELS[4]).out
    want = denoiser.norm_out.linear(F.silu(denoiser.embed_sigma(torch.tensor(LEVELS[4:5]), torch.float32)))
    assert relative_l2(got, want) < REORDERED
