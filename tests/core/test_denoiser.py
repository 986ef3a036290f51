"""The denoiser against the line-by-line oracle, padding, empty text, rounding and large values."""

from __future__ import annotations

import copy
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.denoiser import LensDenoiser
from lens_core.denoiser.transformer import round_sigma
from lens_core.kernels.block import part_of
from lens_core.loading import load_denoiser
from tests.compare import cosine, relative_l2
from tests.reference import straight_line

# fp32 rounds by 6e-8, but 1000 sigma is an angle: near 1000 radians fp32 is off by 3e-5, which shows in
# the fastest sinusoids of the time embedding. Measured: 4e-6 at sigma 1 and 0.6, 3e-7 at 0.03.
FP32 = 1e-5
GRIDS = [(5, 3), (1, 2), (7, 4), (2, 1)]


def inputs(grid: tuple[int, int], tokens: int, sigma: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, sigma and text features whose layers differ in size a hundredfold, as the real ones do."""
    size = torch.tensor([1.0, 5.0, 20.0, 100.0])[:, None]
    return torch.randn(1, grid[0] * grid[1], 128), torch.tensor([sigma]), size * torch.randn(1, tokens, 4, 64)


def velocity(oracle: straight_line.Model, x: Tensor, sigma: Tensor, text: Tensor, grid: tuple) -> Tensor:
    """The oracle's velocity [1, N, 128]."""
    features = list(text[0].unbind(1)) if text.shape[1] else None
    return straight_line.velocity(oracle, x[0], features, sigma.item(), *grid)[None]


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.03])
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("grid", GRIDS)
def test_velocity_equals_the_oracle(
    denoiser: LensDenoiser, oracle: straight_line.Model, grid: tuple[int, int], tokens: int, sigma: float
):
    x, level, text = inputs(grid, tokens, sigma)
    assert relative_l2(denoiser(x, level, text, grid), velocity(oracle, x, level, text, grid)) < FP32


def shrink_activations(weights: dict[str, Tensor]) -> None:
    """Scale weights in place so that every norm sees inputs small enough for its epsilon to matter."""
    for name, tensor in weights.items():
        if name.startswith(("img_in", "txt_in")):
            tensor.mul_(1e-3)
        elif "attn." in name and "qkv" in name:
            tensor[: 2 * len(tensor) // 3].mul_(1e-3)
        elif name.endswith(("_mod.1.bias", "_mod.1.weight")):
            for gate in (2, 5):
                tensor.unflatten(0, (6, -1))[gate].mul_(1e-3)


SMALL_TEXT = 1e-4


@pytest.fixture
def small_activations(denoiser: LensDenoiser, oracle: straight_line.Model) -> tuple[Tensor, Any]:
    """Inputs and the oracle's velocity with epsilons that matter; ``denoiser`` gets the same weights."""
    weights = {name: tensor.clone() for name, tensor in oracle["denoiser"].items()}
    shrink_activations(weights)
    denoiser.load_state_dict(weights)
    x, sigma, text = inputs((5, 3), 9)
    text = SMALL_TEXT * text
    return (x, sigma, text, (5, 3)), velocity({"denoiser": weights}, x, sigma, text, (5, 3))


def test_every_epsilon_is_the_oracles(denoiser: LensDenoiser, small_activations: tuple):
    arguments, want = small_activations
    assert relative_l2(denoiser(*arguments), want) < FP32


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
        ("txt_norm.0", 1e-6),
        ("transformer_blocks.0.img_norm1", 1e-5),
        ("transformer_blocks.1.img_norm2", 1e-5),
        ("transformer_blocks.0.txt_norm1", 1e-5),
        ("transformer_blocks.1.txt_norm2", 1e-5),
        ("transformer_blocks.0.attn.norm_q", 1e-5),
        ("transformer_blocks.1.attn.norm_added_q", 1e-5),
        ("norm_out", 1e-5),
    ],
)
def test_a_wrong_epsilon_is_noticed(
    denoiser: LensDenoiser, small_activations: tuple, module: str, wrong: float
):
    arguments, want = small_activations
    denoiser.get_submodule(module).eps = wrong
    assert relative_l2(denoiser(*arguments), want) > FP32


def test_a_padded_batch_equals_each_text_alone(denoiser: LensDenoiser):
    grid = (5, 3)
    x = torch.randn(2, 15, 128)
    sigma = torch.tensor([0.9, 0.2])
    long, short = inputs(grid, 9)[2], inputs(grid, 4)[2]
    # What stands in the padding must not matter, however large.
    text = torch.cat([long, torch.cat([short, torch.full((1, 5, 4, 64), 1e4)], dim=1)])
    real = torch.arange(9) < torch.tensor([9, 4])[:, None]
    got = denoiser(x, sigma, text, grid, text_real=real)
    for index, alone in enumerate((long, short)):
        want = denoiser(x[index : index + 1], sigma[index : index + 1], alone, grid)
        assert relative_l2(got[index : index + 1], want) < FP32


def test_a_batch_equals_each_picture_alone(denoiser: LensDenoiser):
    x, sigma = torch.randn(2, 28, 128), torch.tensor([0.9, 0.2])
    text = inputs((7, 4), 9)[2]
    got = denoiser(x, sigma, text.expand(2, -1, -1, -1), (7, 4))
    for index in range(2):
        want = denoiser(x[index : index + 1], sigma[index : index + 1], text, (7, 4))
        assert relative_l2(got[index : index + 1], want) < FP32


def test_without_text_real_no_mask_is_built(denoiser: LensDenoiser, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("a mask was built")

    monkeypatch.setattr("lens_core.denoiser.transformer.padding_mask", refuse)
    x, sigma, text = inputs((5, 3), 9)
    masks = []

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        masks.append(mask)
        return v.transpose(1, 2).flatten(2)

    denoiser(x, sigma, text, (5, 3), attention=attention)
    assert masks == [None] * len(denoiser.transformer_blocks)
    with pytest.raises(AssertionError, match="a mask was built"):
        denoiser(x, sigma, text, (5, 3), text_real=torch.ones(1, 9, dtype=torch.bool))


def test_without_text_tokens_no_text_layer_runs(denoiser: LensDenoiser):
    """But the text's modulation, which belongs to the noise level and is kept for a whole run."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a text layer ran")

    for name, module in denoiser.named_modules():
        text_layer = ("txt_qkv", "txt_mlp.w1", "txt_norm1", "txt_norm2", "to_add_out", "txt_in")
        if name.endswith(text_layer) or name.startswith("txt_norm."):
            module.register_forward_pre_hook(refuse)
    x, sigma, text = inputs((5, 3), 1)
    assert denoiser(x, sigma, text[:, :0], (5, 3)).shape == (1, 15, 128)
    with pytest.raises(AssertionError, match="a text layer ran"):
        denoiser(x, sigma, text, (5, 3))


def to_bf16(number: float) -> float:
    """The nearest bf16, ties to even, by its bits."""
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def test_sigma_is_rounded_to_bf16_as_the_reference_does():
    sigmas = torch.linspace(0, 1, 1001)
    got = round_sigma(sigmas, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    want = [to_bf16(to_bf16(thousand) / 1000) for thousand in (sigmas * 1000).tolist()]
    assert got.tolist() == want
    assert (got != sigmas.bfloat16()).any()


def test_sigma_in_fp32_is_kept_but_for_the_last_bit():
    sigmas = torch.linspace(0, 1, 1001)
    torch.testing.assert_close(round_sigma(sigmas, torch.float32), sigmas, rtol=2e-7, atol=0)


def test_the_denoiser_sees_the_rounded_sigma(tiny_folder: Path):
    model = load_denoiser(tiny_folder, torch.bfloat16)
    x, sigma, text = inputs((5, 3), 9, sigma=0.8137)
    x, text = x.bfloat16(), text.bfloat16()
    rounded = torch.tensor([to_bf16(to_bf16(813.7) / 1000)])
    assert rounded != sigma
    assert torch.equal(model.embed_sigma(sigma, x.dtype), model.embed_sigma(rounded, x.dtype))
    # The rounding is no accident of the embedding's own: one bf16 step further it is another.
    assert not torch.equal(model.embed_sigma(rounded + 0.004, x.dtype), model.embed_sigma(sigma, x.dtype))


def in_fp64(model: LensDenoiser, x: Tensor, sigma: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same weights, inputs and rounded sigma in fp64."""
    sigma = round_sigma(sigma, torch.bfloat16).double()
    return copy.deepcopy(model).double()(x.double(), sigma, text.double(), grid)


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.03])
@pytest.mark.parametrize("tokens", [0, 9])
def test_bf16_stays_close_to_fp64(tiny_folder: Path, tokens: int, sigma: float):
    model = load_denoiser(tiny_folder, torch.bfloat16)
    x, level, text = inputs((7, 5), tokens, sigma)
    x, text = x.bfloat16(), text.bfloat16()
    got, want = model(x, level, text, (7, 5)), in_fp64(model, x, level, text, (7, 5))
    assert got.dtype == torch.bfloat16
    # One rounding to bf16 is 2^-9 / sqrt(3) = 0.11 % in the mean; some 10 in a row on each of 3 blocks
    # add up to sqrt(30) of that, 0.6 %, as measured. Twice as much would be another algorithm.
    assert relative_l2(got, want) < 0.0125


@pytest.fixture
def extreme(tiny_folder: Path) -> tuple[LensDenoiser, tuple]:
    """A bf16 model whose values peak at 1.4e5 and whose residual streams at 3e7, with its inputs."""
    model = load_denoiser(tiny_folder, torch.float32)
    x, sigma, text = inputs((7, 5), 9, sigma=0.5)  # not moved by rounding to bf16
    arguments = (x, sigma, text, (7, 5))
    hidden = model.config.hidden_size
    for block in model.transformer_blocks:
        for qkv in (block.attn.img_qkv, block.attn.txt_qkv):
            peak = peaks(model, arguments)[qkv]
            for parameter in (qkv.weight, qkv.bias):
                parameter[2 * hidden :] *= 1.4e5 / peak
    middle = model.transformer_blocks[1]
    reached = peaks(model, arguments)[middle]
    for out, peak in zip((middle.attn.to_out[0], middle.attn.to_add_out), reached, strict=True):
        for parameter in (out.weight, out.bias):
            parameter *= 3e7 / peak
    return model.bfloat16(), (x.bfloat16(), sigma, text.bfloat16(), (7, 5))


def after(args: tuple, out: tuple) -> list[float]:
    """Largest value of each stream once a block's updates are added to it."""
    tables = args[2]
    return [
        (x + part_of(table, 5) * update).abs().max().item()
        for x, update, table in zip(*out, tables, strict=False)
    ]


def peaks(model: LensDenoiser, arguments: tuple) -> dict[torch.nn.Module, Any]:
    """Largest value of every QKV projection, and of both streams after every block."""
    found: dict[torch.nn.Module, Any] = {}
    hidden = model.config.hidden_size
    handles = []
    for block in model.transformer_blocks:
        for qkv in (block.attn.img_qkv, block.attn.txt_qkv):
            handles.append(
                qkv.register_forward_hook(
                    lambda module, _, out: found.update({module: out[..., 2 * hidden :].abs().max().item()})
                )
            )
        handles.append(
            block.register_forward_hook(lambda module, args, out: found.update({module: after(args, out)}))
        )
    model(*arguments)
    for handle in handles:
        handle.remove()
    return found


def test_bf16_bears_values_of_1e5_and_a_residual_stream_of_3e7(extreme: tuple[LensDenoiser, tuple]):
    model, arguments = extreme
    reached = peaks(model, arguments)
    for block in model.transformer_blocks:
        assert reached[block.attn.img_qkv] > 1e5
        assert reached[block.attn.txt_qkv] > 1e5
    assert min(reached[model.transformer_blocks[1]]) > 2e7
    got = model(*arguments)
    assert got.isfinite().all()
    # 0.6 % to 1 % of noise (see above) is a cosine of 1 - 0.01^2 / 2 = 0.99995; measured: 0.9999 or more
    # for the worst token.
    assert cosine(got, in_fp64(model, *arguments)).min() > 0.9997


def test_fp16_does_not_bear_them(extreme: tuple[LensDenoiser, tuple]):
    model, (x, sigma, text, grid) = extreme
    assert not model.half()(x.half(), sigma, text.half(), grid).isfinite().all()
