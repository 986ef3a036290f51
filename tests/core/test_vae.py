"""The VAE against diffusers' own, packing, bytes, and the two namings of its file."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.errors import MissingPackage
from lens_core.loading import load_vae
from lens_core.vae import LensVAE, to_uint8
from lens_core.vae.autoencoder import pack, unpack
from tests.compare import relative_l2
from tools.nano.render import collate, render
from tools.nano.scenes import sample_scene

# The same diffusers layers on the same numbers; only the batch norm's arithmetic differs, by fp32's 6e-8.
SAME = 1e-6
# The decoder's norms sum in another order; both are 1e-6 from fp64, and 0.9e-6 to 1.7e-6 from each other.
IN_STRIPS = 3e-6


@pytest.fixture
def vae(tiny_folder: Path) -> LensVAE:
    return load_vae(tiny_folder, torch.float32)


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Any:
    """diffusers' AutoencoderKLFlux2 by its own loader."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2.from_pretrained(tiny_folder / "vae").eval()


def statistics(reference: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the packed channels as diffusers' Flux2Pipeline forms them."""
    bn = reference.bn
    mean = bn.running_mean.view(1, -1, 1, 1)
    return mean, torch.sqrt(bn.running_var.view(1, -1, 1, 1) + reference.config.batch_norm_eps)


def decoded(reference: Any, latents: Tensor) -> Tensor:
    """Packed latents as Flux2Pipeline decodes them."""
    from diffusers import Flux2Pipeline

    mean, deviation = statistics(reference)
    unpacked = Flux2Pipeline._unpatchify_latents(latents * deviation + mean)
    return reference.decode(unpacked, return_dict=False)[0]


def test_decode_equals_diffusers(vae: LensVAE, reference: Any):
    latents = torch.randn(2, 128, 3, 5)
    want = decoded(reference, latents)
    assert want.shape == (2, 3, 48, 80)
    assert relative_l2(vae.decode_whole(latents), want) < SAME
    assert relative_l2(vae.decode(latents), want) < IN_STRIPS


def test_encode_equals_diffusers(vae: LensVAE, reference: Any):
    from diffusers import Flux2Pipeline

    images = 2 * torch.rand(2, 3, 48, 80) - 1
    mean, deviation = statistics(reference)
    posterior = reference.encode(images).latent_dist
    want = (Flux2Pipeline._patchify_latents(posterior.mean) - mean) / deviation
    assert want.shape == (2, 128, 3, 5)
    assert relative_l2(vae.encode_whole(images), want) < SAME
    assert relative_l2(vae.encode(images), want) < IN_STRIPS


def test_in_bf16_a_trained_vaes_picture_is_fp32s():
    """Nano's, of a drawn picture, against diffusers' in fp32: 60 dB (diffusers' own bf16: 61). Random weights
    amplify rounding: 47 dB for all."""
    from diffusers import AutoencoderKLFlux2

    nano = Path(__file__).parents[2] / "checkpoints" / "nano" / "lens"
    picture = render(collate([sample_scene(random.Random(1), size=(256, 256))]), 256, 256)
    latents = load_vae(nano, torch.float32).encode(picture)
    want = decoded(AutoencoderKLFlux2.from_pretrained(nano / "vae").eval(), latents)
    got = load_vae(nano, torch.bfloat16).decode(latents.bfloat16()).float()
    error = (got.clamp(-1, 1) - want.clamp(-1, 1)).square().mean()
    assert 10 * torch.log10(4 / error) > 55


def test_the_batch_norms_epsilon_is_the_published_one(reference: Any, vae: LensVAE):
    assert reference.config.batch_norm_eps == 1e-4
    assert vae.model.bn.eps == 1e-4


def test_without_de_normalisation_the_picture_is_another(vae: LensVAE, reference: Any):
    latents = torch.randn(1, 128, 3, 5)
    plain = reference.decode(unpack(latents), return_dict=False)[0]
    assert relative_l2(vae.decode(latents), plain) > 1000 * IN_STRIPS


def test_decode_and_encode_mirror_each_others_shapes(vae: LensVAE):
    latents = torch.randn(1, 128, 2, 7)
    images = vae.decode(latents)
    assert images.shape == (1, 3, 32, 112)
    assert vae.encode(images).shape == latents.shape


def test_bf16_decodes_in_bf16_close_to_fp32(tiny_folder: Path, vae: LensVAE):
    latents = torch.randn(1, 128, 3, 5)
    got = load_vae(tiny_folder, torch.bfloat16).decode(latents.bfloat16())
    assert got.dtype == torch.bfloat16
    # Some 40 layers deep, each rounding by 2^-9 / sqrt(3) = 0.11 %: 0.11 % times sqrt(3 * 40) = 1.2 %.
    assert relative_l2(got, vae.decode(latents)) < 0.025


def test_pack_orders_channels_as_channel_row_column():
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    packed = pack(latents)
    assert packed.shape == (1, 8, 2, 3)
    for channel in range(2):
        for row in range(2):
            for column in range(2):
                want = latents[0, channel, row::2, column::2]
                assert torch.equal(packed[0, 4 * channel + 2 * row + column], want)


def test_unpack_undoes_pack():
    latents = torch.randn(2, 32, 6, 10)
    assert torch.equal(unpack(pack(latents)), latents)


def test_pack_and_unpack_equal_diffusers():
    from diffusers import Flux2Pipeline

    latents = torch.randn(2, 32, 6, 10)
    assert torch.equal(pack(latents), Flux2Pipeline._patchify_latents(latents))
    assert torch.equal(unpack(pack(latents)), Flux2Pipeline._unpatchify_latents(pack(latents)))


def test_bytes_are_truncated_and_clamped():
    levels = torch.tensor([-3.0, -1.0, 0.0, 254.9 / 127.5 - 1, 0.1 / 127.5 - 1, 1.0, 3.0])
    pixels = to_uint8(levels.expand(1, 3, 1, -1))
    assert pixels.dtype == torch.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 127, 254, 0, 255, 255]


def test_every_byte_survives_the_round_trip_to_fp32():
    levels = torch.arange(256, dtype=torch.float64)
    # A hair above the exact level: truncation needs it, and it is far below one byte.
    images = ((levels + 1e-3) / 127.5 - 1).float().expand(1, 3, 1, -1)
    assert to_uint8(images)[0, 0, :, 2].tolist() == list(range(256))


def test_bytes_put_the_channels_last():
    image = torch.stack([torch.full((2, 5), level) for level in (-1.0, 0.0, 1.0)])[None]
    pixels = to_uint8(image)
    assert pixels.shape == (1, 2, 5, 3)
    assert pixels[0, 1, 4].tolist() == [0, 127, 255]


def test_bf16_pictures_become_bytes_without_another_rounding():
    image = torch.full((1, 3, 1, 1), 0.5, dtype=torch.bfloat16)
    # (0.5 + 1) * 127.5 = 191.25; in bf16 it would have been 191 or 192 by luck.
    assert to_uint8(image).flatten().tolist() == [191, 191, 191]
    near = torch.full((1, 3, 1, 1), 0.9921875, dtype=torch.bfloat16)
    # 254.0039 in fp32, 254 or 255 in bf16, whose steps are 1 there.
    assert to_uint8(near).flatten().tolist() == [254, 254, 254]


def test_the_compvis_named_file_holds_the_folders_tensors(tiny_models: Path, vae: LensVAE):
    single = load_vae(tiny_models / "vae" / "flux2_tiny_vae.safetensors", torch.float32).state_dict()
    folder = vae.state_dict()
    assert single.keys() == folder.keys()
    assert len(folder) > 100
    for name, tensor in folder.items():
        assert torch.equal(single[name], tensor), name


def test_the_compvis_named_file_decodes_the_same(tiny_models: Path, vae: LensVAE):
    single = load_vae(tiny_models / "vae" / "flux2_tiny_vae.safetensors", torch.float32)
    latents = torch.randn(1, 128, 3, 5)
    assert torch.equal(single.decode(latents), vae.decode(latents))


def compvis_names(channels: tuple[int, ...]) -> list[str]:
    """Tensor names of a file in CompVis' naming, with two resnets a level, as BFL's code makes them."""
    modules = ["encoder.quant_conv", "decoder.post_quant_conv"]
    for part in ("encoder", "decoder"):
        modules += [f"{part}.conv_in", f"{part}.norm_out", f"{part}.conv_out"]
        modules += [f"{part}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
        resnets = {f"{part}.mid.block_1": False, f"{part}.mid.block_2": False}
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)] if part == "encoder" else channels[min(level + 1, 3)]
            for block in range(2 if part == "encoder" else 3):
                where = "down" if part == "encoder" else "up"
                resnets[f"{part}.{where}.{level}.block.{block}"] = block == 0 and before != width
        for resnet, shortcut in resnets.items():
            modules += [f"{resnet}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")]
            modules += [f"{resnet}.nin_shortcut"] if shortcut else []
        for level in range(3):
            sampler = f"down.{level}.downsample" if part == "encoder" else f"up.{level + 1}.upsample"
            modules.append(f"{part}.{sampler}.conv")
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def diffusers_names(names: list[str]) -> dict[str, str]:
    """CompVis name -> diffusers name, by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    numbered = {}
    for number, name in enumerate(names):
        older = name.replace("encoder.quant_conv", "quant_conv").replace("decoder.post_quant", "post_quant")
        numbered[older] = torch.full((1, 1, 1, 1), number)
    blocks = {"down_block_types": range(4), "up_block_types": range(4)}
    return {names[int(tensor)]: name for name, tensor in convert_ldm_vae_checkpoint(numbered, blocks).items()}


def test_compvis_names_of_levels_of_any_width_are_read(tmp_path: Path):
    from diffusers import AutoencoderKLFlux2

    # The published file has 128, 256, 512, 512: shortcuts in either half, which equal widths lack.
    channels = (32, 64, 96, 96)
    model = AutoencoderKLFlux2(block_out_channels=channels, layers_per_block=2, latent_channels=32)
    want = model.state_dict()
    file = {old: want[new] for old, new in diffusers_names(compvis_names(channels)).items()}
    for name, tensor in file.items():
        if ".attn_1." in name and tensor.ndim == 2:
            file[name] = tensor[:, :, None, None].contiguous()  # 1x1 convolutions there
    file |= {name: tensor for name, tensor in want.items() if name.startswith("bn.")}
    save_file(file, tmp_path / "flux2-vae.safetensors")
    got = load_vae(tmp_path / "flux2-vae.safetensors", torch.float32).model.state_dict()
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_a_file_in_diffusers_names_needs_no_config(tmp_path: Path):
    from diffusers import AutoencoderKLFlux2

    model = AutoencoderKLFlux2(block_out_channels=(32, 64, 96, 96), layers_per_block=2, latent_channels=32)
    want = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    save_file(want, tmp_path / "vae.safetensors")
    got = load_vae(tmp_path / "vae.safetensors", torch.float32).model.state_dict()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_the_published_sizes_are_diffusers_defaults():
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        model = AutoencoderKLFlux2()
    assert sum(parameter.numel() for parameter in model.parameters()) == 84_046_115


def test_a_missing_or_old_diffusers_is_named_with_the_pip_line(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """A module without the class is what an old diffusers looks like."""
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    with pytest.raises(MissingPackage, match=r"pip install 'diffusers>=0\.38'"):
        load_vae(tiny_folder, torch.float32)


def test_colours_of_a_linear_vae_are_found(monkeypatch: pytest.MonkeyPatch):
    """Where latents are a linear map of colours, the fit is its inverse up to the small penalty on size."""
    from torch.nn.functional import avg_pool2d, pixel_unshuffle

    from lens_core.vae import linear_colours

    class LinearVAE(torch.nn.Linear):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            known = self(avg_pool2d(images, 8).movedim(1, -1)).movedim(-1, 1)
            return pixel_unshuffle(known, 2)

    vae = LinearVAE(3, 8)
    factors, bias = linear_colours(vae)
    colours = torch.rand(50, 3) * 2 - 1
    torch.testing.assert_close(vae(colours) @ factors + bias, colours, atol=0.05, rtol=0)
