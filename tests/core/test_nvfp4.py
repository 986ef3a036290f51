"""NVFP4 against comfy_kitchen's own: unpacking, the order of the scales, and files as ComfyUI has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.backends.eager.quantization import dequantize_nvfp4
from comfy_kitchen.float_utils import from_blocked, to_blocked
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_core.config import EncoderConfig
from lens_core.encoder import GptOssEncoder, encode_prompts
from lens_core.encoder.moe import PackedExperts
from lens_core.kernels.eager import clamped_swiglu
from lens_core.kernels.eager import experts as run_experts
from lens_core.loading import load_encoder, open_encoder
from lens_core.quant import FORMATS, mxfp4
from lens_core.quant.nvfp4 import dequantize, quantize
from lens_core.weights.banks import unblocked
from tests import encoder_files as files
from tests.compare import per_token_l2, relative_l2

MXFP4 = "text_encoders/gpt_oss_tiny_mxfp4.safetensors"
NVFP4 = "text_encoders/gpt_oss_tiny_nvfp4.safetensors"


def kitchen(packed: Tensor, scales: Tensor, factor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One expert by comfy_kitchen: packed u8 [N, K/2] with the first value high, scales e4m3 tiled."""
    return dequantize_nvfp4(packed, factor, scales.view(torch.float8_e4m3fn), dtype)


def high_first(blocks: Tensor) -> Tensor:
    return ((blocks << 4) | (blocks >> 4)).flatten(-2)


def random_expert(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Any bytes, any scale but the two NaNs, and a factor that is no power of two."""
    blocks = torch.randint(0, 256, (rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(0, 254, (rows, columns // 16), dtype=torch.uint8)
    scales[scales >= 127] += 1
    return blocks, scales, torch.tensor(0.0123)


@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (2880, 2880), (40, 96), (5, 32)])
def test_dequantize_equals_comfy_kitchen(rows: int, columns: int):
    blocks, scales, factor = random_expert(rows, columns)
    want = kitchen(high_first(blocks), to_blocked(scales), factor)
    got = dequantize(blocks, scales, factor, torch.float32)
    assert got.shape == (rows, columns)
    assert torch.equal(got, want)
    assert torch.equal(got.signbit(), want.signbit())


def test_16_bit_results_are_rounded_once():
    blocks, scales, factor = random_expert(64, 64)
    want = kitchen(high_first(blocks), to_blocked(scales), factor)
    assert torch.equal(dequantize(blocks, scales, factor, torch.bfloat16), want.bfloat16())
    assert torch.equal(dequantize(blocks, scales, factor, torch.float16), want.half())


def test_a_bank_has_a_factor_for_each_expert():
    experts = [random_expert(8, 64)[:2] for _ in range(3)]
    blocks, scales = (torch.stack(parts) for parts in zip(*experts, strict=True))
    factors = torch.tensor([0.5, 3.0, 0.01])
    got = dequantize(blocks, scales, factors, torch.float32)
    for expert in range(3):
        one = dequantize(blocks[expert], scales[expert], factors[expert], torch.float32)
        assert torch.equal(got[expert], one)


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (5760, 180), (2880, 180), (1, 1), (130, 6)])
def test_scales_come_out_of_cublas_order(rows: int, columns: int):
    scales = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    tiled = to_blocked(scales, flatten=False)
    assert torch.equal(unblocked(tiled, rows, columns), scales)
    assert torch.equal(unblocked(tiled, rows, columns), from_blocked(tiled, rows, columns))


def test_quantize_finds_the_nearest_value_for_its_scales():
    weight = torch.randn(3, 64, 128) * torch.tensor([1.0, 1e-3, 40.0])[:, None, None]
    blocks, scales, factors = quantize(weight)
    assert (blocks.shape, scales.shape, factors.shape) == ((3, 64, 4, 16), (3, 64, 8), (3,))
    got = dequantize(blocks, scales, factors, torch.float32)
    unit = scales.view(torch.float8_e4m3fn).float() * factors[:, None, None]
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * unit[..., None, None]  # [3, 64, 8, 1, 8]
    distance = (weight.abs().unflatten(-1, (-1, 16)).unsqueeze(-1) - values).abs().amin(-1)
    error = (got - weight).abs().unflatten(-1, (-1, 16))
    # Sums in another order: one rounding of fp32 on either side.
    assert torch.allclose(error, distance, rtol=1e-5, atol=1e-9)
    assert relative_l2(got, weight) < 0.12  # 4 bits on normal numbers; measured 0.095


def test_quantize_of_zeros_is_zeros():
    assert torch.equal(dequantize(*quantize(torch.zeros(2, 4, 32)), torch.float32), torch.zeros(2, 4, 32))


def test_the_table_of_formats_has_one_signature():
    blocks, scales, factor = random_expert(8, 64)
    got = FORMATS["nvfp4"].dequantize(blocks, scales, factor, torch.float32)
    assert torch.equal(got, dequantize(blocks, scales, factor, torch.float32))
    got = FORMATS["mxfp4"].dequantize(blocks, scales[:, ::2], None, torch.float32)
    assert torch.equal(got, mxfp4.dequantize(blocks, scales[:, ::2], torch.float32))
    with pytest.raises(ValueError, match="pass None"):
        FORMATS["mxfp4"].dequantize(blocks, scales[:, ::2], factor, torch.float32)
    with pytest.raises(ValueError, match="got None"):
        FORMATS["nvfp4"].dequantize(blocks, scales, None, torch.float32)


def test_experts_run_on_nvfp4_as_on_the_values_it_stands_for():
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    experts = PackedExperts(EncoderConfig(expert_format="nvfp4", **sizes), torch.float32)
    dense = {}
    for name, shape in (("gate_up_proj", (4, 64, 64)), ("down_proj", (4, 64, 32))):
        packed = quantize(torch.randn(shape) / 8)
        for part, tensor in zip(("blocks", "scales", "scale"), packed, strict=True):
            assert getattr(experts, f"{name}_{part}").shape == tensor.shape
            getattr(experts, f"{name}_{part}").copy_(tensor)
        getattr(experts, f"{name}_bias").copy_(torch.randn(shape[:2]))
        dense[name] = torch.stack(
            [
                kitchen(high_first(blocks), to_blocked(scales), factor)
                for blocks, scales, factor in zip(*packed, strict=True)
            ]
        )
    x, chosen, weights = torch.randn(5, 64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    want = torch.zeros(5, 64)
    for token in range(5):
        for slot in range(2):
            e = chosen[token, slot]
            inner = F.linear(x[token], dense["gate_up_proj"][e], experts.gate_up_proj_bias[e])
            inner = clamped_swiglu(inner, experts.alpha, experts.limit)
            want[token] += weights[token, slot] * F.linear(
                inner, dense["down_proj"][e], experts.down_proj_bias[e]
            )
    assert (
        relative_l2(run_experts(x, chosen, weights, experts.bank()).sum(1), want) < 1e-6
    )  # fp32 sums in another order


@pytest.fixture(scope="module")
def weights(tiny_models: Path) -> dict[str, Tensor]:
    """Hugging Face's MXFP4 tensors of the tiny encoder."""
    tensors = load_file(tiny_models / MXFP4)
    del tensors["tokenizer_json"]
    return tensors


@pytest.fixture
def stored(tiny_models: Path) -> dict[str, Tensor]:
    """The tiny nvfp4 file's tensors."""
    return load_file(tiny_models / NVFP4)


def load(path: Path) -> GptOssEncoder:
    file = open_encoder(path)
    encoder = GptOssEncoder(file.config, dtype=torch.bfloat16, device="meta")
    file.load(encoder, torch.bfloat16)
    return encoder


def assert_holds(encoder: GptOssEncoder, stored: dict[str, Tensor]) -> None:
    """Every expert's values are what comfy_kitchen makes of the file's tensors, to the bit."""
    assert encoder.config.expert_format == "nvfp4"
    for index, layer in enumerate(encoder.layers):
        for name in ("gate_up_proj", "down_proj"):
            bank = f"layers.{index}.mlp.experts.{name}"
            blocks, scales, factors = (
                getattr(layer.mlp.experts, f"{name}_{part}") for part in ("blocks", "scales", "scale")
            )
            assert factors.dtype == torch.float32
            for expert in range(blocks.shape[0]):
                factor = stored[f"{bank}.weight_scale_2"]
                want = kitchen(
                    stored[f"{bank}.weight"][expert],
                    stored[f"{bank}.weight_scale"][expert],
                    factor if factor.ndim == 0 else factor[expert],
                )
                got = dequantize(blocks[expert], scales[expert], factors[expert], torch.float32)
                assert torch.equal(got, want), (bank, expert)


def test_the_tiny_file_is_read_natively(tiny_models: Path, stored: dict[str, Tensor]):
    assert_holds(load(tiny_models / NVFP4), stored)


def bytes_for_scales(stored: dict[str, Tensor]) -> None:
    for name in [name for name in stored if name.endswith(".weight_scale")]:
        stored[name] = stored[name].view(torch.uint8)


def one_factor(stored: dict[str, Tensor]) -> None:
    for name in [name for name in stored if name.endswith(".weight_scale_2")]:
        stored[name] = stored[name][0].clone()


def flat_scales(stored: dict[str, Tensor]) -> None:
    for name in [name for name in stored if name.endswith(".weight_scale")]:
        stored[name] = stored[name].flatten(1)


@pytest.mark.parametrize("change", [bytes_for_scales, one_factor, flat_scales])
def test_scales_may_be_stored_otherwise(
    tmp_path: Path, stored: dict[str, Tensor], change: Callable[[dict[str, Tensor]], None]
):
    change(stored)
    save_file(stored, tmp_path / "x.safetensors")
    assert_holds(load(tmp_path / "x.safetensors"), stored)


def test_the_tiny_nvfp4_encoder_is_the_mxfp4_one_but_for_rounding(tiny_models: Path):
    ids = torch.randint(0, 256, (40,)).tolist()
    encoders = (load_encoder(tiny_models / name, torch.float32)[0] for name in (MXFP4, NVFP4))
    (want,), (got,) = (encode_prompts(one, (), [ids], "cpu", torch.float32) for one in encoders)
    error = per_token_l2(got, want)
    # Two 4-bit roundings of the same experts through 24 layers; another model's features are above 1.
    assert 1e-3 < error.median() < 0.5


def rebundled_but_one(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A lossless bundle in which one of a pair of scales is halved."""
    packed, e4m3, factors = files.rebundled(blocks, scales)
    e4m3[-1, -1, -1] = e4m3[-1, -1, -1].float() / 2
    return packed, e4m3, factors


def with_three_halves(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A lossless bundle but for a pair of scales that is no power of two."""
    packed, e4m3, factors = files.rebundled(blocks, scales)
    e4m3[0, 0, :2] = 1.5
    return packed, e4m3, factors


def with_another_factor(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Powers of two for scales, under a factor that is none."""
    packed, e4m3, factors = files.rebundled(blocks, scales)
    factors[-1] *= 1.5
    return packed, e4m3, factors


def with_a_zero(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block of zeros by its scale, which MXFP4 cannot say."""
    packed, e4m3, factors = files.rebundled(blocks, scales)
    e4m3[0, 0, :2] = 0
    return packed, e4m3, factors


@pytest.mark.parametrize("bundle", [rebundled_but_one, with_three_halves, with_another_factor, with_a_zero])
def test_one_bank_that_mxfp4_cannot_hold_keeps_the_whole_file_nvfp4(
    tmp_path: Path, weights: dict[str, Tensor], bundle: Callable
):
    stored = files.comfy_nvfp4(weights, files.rebundled)
    last = files.comfy_nvfp4(weights, bundle)
    stored |= {name: tensor for name, tensor in last.items() if name.startswith("layers.23.mlp.experts.down")}
    encoder = load(files.save(tmp_path / "x.safetensors", stored))
    assert_holds(encoder, stored)


def test_scales_over_all_of_e4m3s_powers_are_repacked_exactly(tmp_path: Path, weights: dict[str, Tensor]):
    changed = dict(weights)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    spread = torch.arange(110, 128, dtype=torch.uint8)  # 18 binades: e4m3's 2^-9 to 2^8
    changed[name] = spread.repeat(-(-changed[name].numel() // 18))[: changed[name].numel()].view_as(
        changed[name]
    )
    encoder = load(files.save(tmp_path / "x.safetensors", files.comfy_nvfp4(changed, files.rebundled)))
    assert encoder.config.expert_format == "mxfp4"
    assert torch.equal(encoder.layers[0].mlp.experts.down_proj_scales, changed[name])
    blocks = changed["model.layers.0.mlp.experts.down_proj_blocks"]
    assert torch.equal(encoder.layers[0].mlp.experts.down_proj_blocks, blocks)
