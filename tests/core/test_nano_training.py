"""Training code of the nano models against the product's: what is trained is what is run."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lens_core.denoiser import LensDenoiser
from lens_core.encoder import GptOssEncoder
from lens_core.encoder.features import encode_prompts
from lens_core.quant.layer_format import affine4
from lens_core.quant.linear import dequantize, quantize
from lens_core.sampling import euler, norm_rescaled_guidance, sigmas
from lens_core.tiny import models
from tests.compare import relative_l2
from tools.nano.configs import DENOISER, encoder_config
from tools.nano.denoiser import TrainedDenoiser
from tools.nano.distill import Distillation, levels_between, twin
from tools.nano.encoder import TrainedEncoder
from tools.nano.flow import FlowStep, training_mu
from tools.nano.models import Models, write
from tools.nano.properties import PROPERTIES, properties
from tools.nano.scenes import COLOURS, SIZES, sample_scene
from tools.nano.team import EVERY, Team
from tools.nano.train_encoder import Probes
from tools.nano.training import Masters
from tools.nano.unpack import dense, unpack

# Properties that every scene has, and the one colour that no background fades to.
ABSENT = {0: {0}, 1: {0}, 9: {0}, 10: {list(COLOURS).index("gray") + 1}, 11: {0}}


def test_the_trained_encoder_is_the_products():
    """In fp32, of packed weights: prompts of several lengths after a prefix longer than the window."""
    torch.manual_seed(0)
    trained = TrainedEncoder(encoder_config(), torch.float32)
    for name, parameter in trained.named_parameters():
        if "bias" in name or "norm" in name or name == "sinks":
            parameter.data += 0.3 * torch.randn_like(parameter)
        parameter.data = parameter.data.bfloat16().float()  # as files store them
    product = GptOssEncoder(encoder_config(), dtype=torch.float32)
    packed = models.packed_encoder(trained.state())
    own = {name.removeprefix("model."): value for name, value in packed.items()}
    missing, unexpected = product.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in own.items()}, strict=False
    )
    assert not missing and set(unexpected) == {"norm.weight", "lm_head.weight"}
    prefix = torch.randint(0, 600, (140,))
    tails = [torch.randint(0, 600, (length,)).tolist() for length in (5, 40, 17)]
    with torch.no_grad():
        expected = encode_prompts(product, prefix.tolist(), tails, "cpu", torch.float32)
        padded = torch.zeros(3, 40, dtype=torch.long)
        for row, tail in enumerate(tails):
            padded[row, : len(tail)] = torch.tensor(tail)
        features, logits = trained(prefix, padded)
    assert logits.shape == (3, 40, 600)
    for row, (tail, wanted) in enumerate(zip(tails, expected, strict=True)):
        # fp32 sums in another order, through 24 layers.
        assert relative_l2(features[row, : len(tail)], wanted[0]) < 2e-5


def test_the_noise_levels_shift_with_the_size():
    """The paper's mean, 1.0 to 1.3, over the nine sizes."""
    tokens = sorted(height // 16 * (width // 16) for height, width in SIZES)
    found = [training_mu(count) for count in tokens]
    assert found == sorted(found) and (found[0], found[-1]) == (1.0, pytest.approx(1.3))


@pytest.mark.parametrize("first", range(4))
def test_the_teacher_walks_between_the_students_levels(first: int):
    """It begins and ends exactly where the product's four steps do."""
    levels = sigmas(4, 256)
    between = levels_between(first, 256, 5)
    assert len(between) == 6 and (between.diff() < 0).all()
    torch.testing.assert_close(between[[0, -1]], levels[[first, first + 1]], rtol=0, atol=1e-7)


@torch.inference_mode(False)
@torch.enable_grad()
def test_masters_are_adamw_in_fp32():
    """bf16 parameters follow fp32 masters, which move where torch's own AdamW moves; the norm is limited."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 4, dtype=torch.bfloat16)
    own = [p.detach().float().clone().requires_grad_() for p in layer.parameters()]
    masters = Masters(layer.parameters())
    plain = torch.optim.AdamW(own, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01)
    for scale in (0.1, 50.0):
        masters.rate.fill_(1e-2)
        layer(scale * torch.randn(16, 8).bfloat16()).square().sum().backward()
        for value, parameter in zip(own, layer.parameters(), strict=True):
            value.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        masters.step()
        plain.step()
    for value, mine, parameter in zip(own, masters.values, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, value.detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(parameter.detach(), mine.bfloat16()) and parameter.grad is None


def test_turbo_learns_the_teachers_guided_way():
    """The target of a step is where the product's sampler, guided, gets to from the same place."""
    torch.manual_seed(0)
    teacher = LensDenoiser(DENOISER).bfloat16()
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    lesson = Distillation(teacher.requires_grad_(False), None, None, None, (64, 64), parts=3, scale=5.0)
    x, text = torch.randn(2, 16, 32), torch.randn(2, 9, 4, 64).bfloat16()
    real = torch.ones(2, 9, dtype=torch.bool)
    got = lesson.target(2, x, text, real)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        run = [
            teacher(latents.bfloat16(), sigma.expand(2), part, (4, 4)).float() for part in (text, text[:, :0])
        ]
        return norm_rescaled_guidance(*run, 5.0)

    levels = levels_between(2, 16, 3)
    with torch.no_grad():
        arrived = euler(velocity, x, levels)
    wanted = (arrived - x) / (levels[-1] - levels[0])
    # bf16 forwards: with a mask and with no text at all they round apart.
    assert relative_l2(got, wanted) < 2e-2


@torch.inference_mode(False)
@torch.enable_grad()
def test_hidden_matrices_move_as_by_torchs_muon():
    """The library's takes one matrix after the other, and its rate from the CPU."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(rows, 8)) for rows in (24, 24, 5)]
    other = torch.nn.Parameter(torch.zeros(8))
    own = [p.detach().clone().requires_grad_() for p in matrices]
    masters = Masters([other, *matrices], hidden=matrices)
    library = torch.optim.Muon(own, lr=3e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        masters.rate.fill_(3e-2)
        for value, parameter in zip(own, matrices, strict=True):
            parameter.grad = 1e-2 * torch.randn_like(parameter)
            value.grad = parameter.grad.clone()
        masters.step()
        library.step()
    for value, mine in zip(own, masters.values[1:], strict=True):
        # Both iterate in bf16; batched products may round in another order.
        assert relative_l2(mine, value.detach()) < 2e-3


@torch.inference_mode(False)
@torch.enable_grad()
def test_the_trained_denoiser_is_the_products():
    """Filled up to multiples of 8, it computes and learns the same."""
    torch.manual_seed(0)
    trained, product = TrainedDenoiser(DENOISER), LensDenoiser(DENOISER)
    for parameter in trained.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    product.load_state_dict(trained.state_dict())
    x, sigma, text = torch.randn(2, 16, 32), torch.tensor([0.3, 0.7]), torch.randn(2, 9, 4, 64)
    got, wanted = trained(x, sigma, text, (4, 4)), product(x, sigma, text, (4, 4))
    got.square().sum().backward()
    wanted.square().sum().backward()
    # fp32 sums in another order.
    assert relative_l2(got, wanted) < 2e-6
    for name, parameter in product.named_parameters():
        if parameter.grad is not None and parameter.grad.any():  # no one reads the last block's text
            assert relative_l2(trained.get_parameter(name).grad, parameter.grad) < 2e-5, name


def test_a_twin_walks_as_the_student_does_now():
    student = TrainedDenoiser(DENOISER)
    walker = twin(student)
    student.img_in.weight.data.add_(1.0)
    assert walker.img_in.weight.data_ptr() == student.img_in.weight.data_ptr()
    assert torch.equal(walker.img_in.weight, student.img_in.weight)
    assert not any(parameter.requires_grad for parameter in walker.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_what_captions_say_are_classes():
    """As many as there are properties, each within its classes, and all of them occur but for letters that no
    word has there."""
    rng = random.Random(0)
    sizes = [size for part in PROPERTIES for size in part]
    told = torch.tensor([properties(sample_scene(rng)) for _ in range(6000)])
    assert told.shape[1] == len(sizes)
    letters = len(sizes) - 5
    for index, size in enumerate(sizes):
        seen = set(told[:, index].tolist())
        if index < letters:
            assert seen == set(range(size)) - ABSENT.get(index, set()), index
        else:
            assert {0} < seen < set(range(size)), index


def test_scenes_that_say_different_things_have_different_classes():
    rng = random.Random(1)
    scenes = [sample_scene(rng) for _ in range(2000)]
    by_classes = {}
    for scene in scenes:
        said = replace(scene, height=0, width=0, places=(), tint=())
        assert by_classes.setdefault(tuple(properties(scene)), said) == said


@pytest.mark.parametrize("back", range(len(PROPERTIES)))
def test_each_of_the_last_tokens_tells_its_own_part(back: int):
    """Whatever else changes in the features, and however long the caption is."""
    torch.manual_seed(0)
    probes, lengths = Probes(64), torch.tensor([12, 7, 10])
    real = torch.arange(12) < lengths[:, None]
    features, rows = torch.randn(3, 12, 4, 64), torch.arange(3)
    others, own = torch.randn_like(features), features.clone()
    own[rows, lengths - 1 - back] = others[rows, lengths - 1 - back]
    others[rows, lengths - 1 - back] = features[rows, lengths - 1 - back]
    first, told = sum(map(len, PROPERTIES[:back])), probes(features, real)
    mine = range(first, first + len(PROPERTIES[back]))
    for index, (before, kept, changed) in enumerate(
        zip(told, probes(others, real), probes(own, real), strict=True)
    ):
        assert before.shape[:2] == (4, 3)
        assert torch.equal(before, kept if index in mine else changed)
        assert not torch.equal(before, changed if index in mine else kept)


def _learn_apart(rank: int, port: int, found: multiprocessing.Queue) -> None:
    """A process of two goes its own way; the first says at their third meeting that it is over."""
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    team, layer, step = Team(), torch.nn.Linear(4, 4, bias=False), 0
    masters, over = Masters(layer.parameters()), iter([False, False, rank == 0])
    while team.goes_on(step, lambda: next(over), masters):
        masters.values[0].fill_(10.0 * rank + step)
        step += 1
    found.put((rank, step, layer.weight.unique().tolist()))


def test_a_team_holds_the_mean_and_ends_together():
    forked = multiprocessing.get_context("fork")
    found = forked.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [forked.Process(target=_learn_apart, args=(rank, port, found)) for rank in range(2)]
    for worker in workers:
        worker.start()
    told = sorted(found.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    # One had gone to 199, the other to 209.
    assert told == [(rank, 2 * EVERY, [2 * EVERY - 1 + 5.0]) for rank in range(2)]


@pytest.mark.parametrize("tokens", [(4, 4), (16, 16)])
def test_half_of_the_pictures_learn_where_the_sampler_is(tokens: tuple[int, int]):
    """At the first steps' levels the paper's distribution has hardly any."""
    torch.manual_seed(0)
    step = FlowStep(LensDenoiser(DENOISER), None, tokens)
    levels = step.noise_levels(20_000, torch.device("cpu"))
    scheduled, normal = levels.chunk(2)
    of_run = sigmas(20, tokens[0] * tokens[1])
    for level in of_run[[1, 5, 10, 15]]:
        share = (of_run[:-1] > level).float().mean()
        # A level is one of 20, and of 10,000 a share is known to 0.01.
        assert ((scheduled > level).float().mean() - share).abs() < 0.06
    assert (normal > of_run[3]).float().mean() < 0.02 < 0.1 < (scheduled > of_run[3]).float().mean()
    # A logit-normal's mean; 10,000 of deviation 1.
    assert (normal.logit().mean() - step.mu).abs() < 0.04


def test_in_four_bits_parameters_are_rounded_and_masters_are_not():
    """A matrix of whole groups as the product's 4 bits hold it, in half of the steps; another never."""
    torch.manual_seed(0)
    whole, odd = (torch.nn.Linear(size, 8, bias=False).bfloat16().weight for size in (128, 100))
    masters = Masters([whole, odd], rounded=[whole, odd], four_bits=0.5)
    in_four = []
    for _ in range(40):
        masters.rate.fill_(1e-3)
        for parameter in (whole, odd):
            parameter.grad = torch.randn_like(parameter)
        masters.step()
        held = dequantize(quantize(masters.values[0], affine4), torch.bfloat16)
        in_four.append(torch.equal(whole, held))
        assert in_four[-1] or torch.equal(whole, masters.values[0].bfloat16())
        assert torch.equal(odd, masters.values[1].bfloat16())
    # Of 40 by chance with 1/2: fewer than 8 or more than 32 once in 10,000 seeds.
    assert 8 <= sum(in_four) <= 32


def test_a_published_folder_is_a_run_to_go_on_from(nano_models: Path, tmp_path: Path):
    """Unpacked, read as training does and written again: the same files, experts by their values."""
    published = nano_models / "lens"
    unpack(published, tmp_path / "run")
    run = Models(tmp_path / "run", torch.device("cpu"))
    run.denoiser.load_state_dict(torch.load(tmp_path / "run" / "trained.pt"))
    write(tmp_path / "again", run)
    files = sorted(path.relative_to(published) for path in published.rglob("*.safetensors"))
    assert len(files) == 3
    for path in files:
        was, now = (dense(load_file(folder / path)) for folder in (published, tmp_path / "again"))
        assert was.keys() == now.keys()
        assert all(torch.equal(was[name], now[name]) for name in was), path
    tokenizer = Path("tokenizer", "tokenizer.json")
    assert (tmp_path / "again" / tokenizer).read_text() == (published / tokenizer).read_text()
