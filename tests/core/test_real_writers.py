"""Folders as the libraries write them that published ones come from: diffusers, huggingface_hub, SDNQ."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lens_core.denoiser import LensDenoiser
from lens_core.loading import load_denoiser, load_vae
from lens_core.tiny import models
from lens_core.weights import inspect
from tests.compare import relative_l2
from tests.core.denoiser_layouts import layers_of, velocity
from tests.core.test_loading import same_tensors


@pytest.mark.parametrize(
    ("shards", "layout"), [("10GB", "folder with one file"), ("600KB", "folder of 3 shards")]
)
def test_a_vae_saved_by_diffusers(
    tiny_folder: Path, tiny_models: Path, tmp_path: Path, shards: str, layout: str
):
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2.from_config(models.VAE)
    vae.load_state_dict(load_file(tiny_folder / "vae" / "diffusion_pytorch_model.safetensors"))
    vae.save_pretrained(tmp_path / "vae", max_shard_size=shards)
    [kind] = inspect(tmp_path)
    assert (kind.component, kind.layout) == ("vae", layout)
    want = load_vae(tiny_models / "vae" / "flux2_tiny_vae.safetensors", torch.float32)
    got = load_vae(tmp_path, torch.float32)
    assert same_tensors(got, want)
    latents = torch.randn(1, 128, 2, 2)
    assert torch.equal(got.decode(latents), want.decode(latents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["10GB", "800KB"])
def test_a_denoiser_saved_by_huggingface_hub(
    tiny_folder: Path, tmp_path: Path, dtype: torch.dtype, size: str
):
    from huggingface_hub import save_torch_state_dict

    plain = load_denoiser(tiny_folder, dtype)
    folder = tmp_path / "transformer"
    folder.mkdir()
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(plain.state_dict(), folder, filename_pattern=pattern, max_shard_size=size)
    [kind] = inspect(tmp_path)
    assert (len(kind.paths) > 1) == (size == "800KB")
    assert kind.quantisation == ("F32" if dtype == torch.float32 else "BF16")
    for held in (torch.float32, torch.bfloat16):
        got, want = load_denoiser(tmp_path, held), load_denoiser(tiny_folder, dtype).to(held)
        assert same_tensors(got, want)
        # The weights lie at other addresses, by which BLAS chooses the order of its sums: their last bits.
        assert relative_l2(velocity(got), velocity(want)) < (1e-6 if held == torch.float32 else 1e-2)


def test_a_denoiser_saved_by_sdnq(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the published uint4 folders were made: every linear of the blocks but the modulation's; here not w2,
    whose inputs are an odd number in the tiny model."""
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")  # read as it is imported
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from sdnq.loader import save_sdnq_model
    from sdnq.quantizer import sdnq_post_load_quant
    from sdnq.utils import get_sdnq_params

    class LensTransformer2DModel(ModelMixin, ConfigMixin):
        config_name = "config.json"

        @register_to_config
        def __init__(self) -> None:
            super().__init__()

    def linears(module: torch.nn.Module) -> list[str]:
        return [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]

    plain = load_denoiser(tiny_folder, torch.bfloat16)
    model = LensTransformer2DModel()
    for name, child in plain.named_children():
        model.add_module(name, child)
    quantized = re.compile(r"transformer_blocks\..*(?<!_mod)\.(?!w2$)\w+$")
    kept = [name for name in linears(model) if not quantized.match(name)]
    recipe = {"weights_dtype": "uint4", "quantized_matmul_dtype": "int8", "use_quantized_matmul": True}
    recipe |= {"group_size": 0, "dequantize_fp32": False, "torch_dtype": torch.bfloat16}
    recipe |= {"modules_to_not_convert": [f"{name}.weight" for name in kept], "add_skip_keys": False}
    found = sdnq_post_load_quant(model, **recipe)
    saved = found[0] if isinstance(found, tuple) else found
    save_sdnq_model(saved, str(tmp_path / "transformer"))

    [kind] = inspect(tmp_path)
    assert (kind.component, kind.quantisation) == ("denoiser", "SDNQ uint4")
    got = load_denoiser(tmp_path, torch.bfloat16)
    dense = LensDenoiser(got.config, dtype=torch.bfloat16)
    dense.load_state_dict(load_denoiser(tiny_folder, torch.bfloat16).state_dict())
    assert sorted(layers_of(got)) == sorted(set(linears(dense)) - set(kept))
    for name, layer in layers_of(got).items():
        real = saved.get_submodule(name)
        values = real.sdnq_dequantizer(**get_sdnq_params(real), skip_quantized_matmul=True)
        assert torch.equal(layer.dequantized(torch.bfloat16), values.bfloat16()), name
        dense.get_submodule(name).weight.data = layer.dequantized(torch.bfloat16)
    assert relative_l2(velocity(got), velocity(dense)) < 1e-2  # bf16's rounding; the weights are the same
