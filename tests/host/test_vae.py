"""Stock VAE nodes on our VAE, our decoding node on stock's, and both on one FLUX.2 VAE of full size."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from lens_core.loading import load_vae
from tests.compare import relative_l2
from tests.host.helpers import random_latent


@pytest.fixture(scope="module")
def latent():
    return {"samples": random_latent(2, (6, 4))}


@pytest.fixture(scope="module")
def module(tiny_folder):
    """lens_core's own module, without ComfyUI."""
    return load_vae(tiny_folder, torch.float32)


def test_stock_decode_is_ours(host, tiny, module, latent):
    (ours,) = host.run("LensVAEDecode", latent=latent, vae=tiny.vae)
    (stock,) = host.run("VAEDecode", samples=latent, vae=tiny.vae)
    assert torch.equal(ours, stock)
    want = (module.decode(latent["samples"]).movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    assert ours.shape == want.shape == (2, 96, 64, 3)
    # The same network one picture at a time or two at once; measured: below 1e-6.
    assert relative_l2(ours, want) < 1e-5


def test_stock_encode_is_the_posterior_mean(host, tiny, module):
    pixels = torch.rand(2, 96, 64, 3)
    (encoded,) = host.run("VAEEncode", pixels=pixels, vae=tiny.vae)
    want = module.encode(pixels.movedim(-1, 1) * 2 - 1)
    assert encoded["samples"].shape == (2, 128, 6, 4)
    assert relative_l2(encoded["samples"], want) < 1e-5


def test_stock_encode_crops_to_whole_tokens(host, tiny):
    pixels = torch.rand(1, 100, 75, 4)
    (encoded,) = host.run("VAEEncode", pixels=pixels, vae=tiny.vae)
    (cropped,) = host.run("VAEEncode", pixels=pixels[:, 2:98, 5:69, :3], vae=tiny.vae)
    assert torch.equal(encoded["samples"], cropped["samples"])


def test_tiles_larger_than_the_picture_change_nothing(host, tiny, latent):
    (whole,) = host.run("VAEDecode", samples=latent, vae=tiny.vae)
    (tiled,) = host.run("VAEDecodeTiled", samples=latent, vae=tiny.vae, tile_size=512, overlap=64)
    assert relative_l2(tiled, whole) < 1e-5
    pixels = torch.rand(1, 96, 64, 3)
    (encoded,) = host.run("VAEEncode", pixels=pixels, vae=tiny.vae)
    (tiled,) = host.run("VAEEncodeTiled", pixels=pixels, vae=tiny.vae, tile_size=512, overlap=64)
    assert relative_l2(tiled["samples"], encoded["samples"]) < 1e-5


def test_tiles_are_the_whole_picture_in_less_memory(host, tiny, monkeypatch):
    """Not a pixel tells where ComfyUI's tiles would have been."""
    latent = {"samples": random_latent(2, (24, 16))}
    (whole,) = host.run("VAEDecode", samples=latent, vae=tiny.vae)
    decode, seen = tiny.vae.first_stage_model.decode, []

    def noted(samples, **way):
        seen.append((samples.shape, way, tiny.vae.memory_used_decode(samples.shape, torch.float32)))
        return decode(samples, **way)

    monkeypatch.setattr(tiny.vae.first_stage_model, "decode", noted, raising=False)
    (tiled,) = host.run("VAEDecodeTiled", samples=latent, vae=tiny.vae, tile_size=128, overlap=32)
    assert relative_l2(tiled, whole) < 1e-5
    estimate = tiny.vae.first_stage_model.decode_bytes
    for shape, way, need in seen:
        assert shape[2:] == (24, 16) and way == {"frugal_memory": True}
        assert need == int(1.3 * estimate(24, 16, 4, frugal_memory=True))
    assert tiny.vae.memory_used_decode((1, 128, 24, 16), torch.float32) == int(1.3 * estimate(24, 16, 4))


def test_smaller_tiles_fit_together(host, tiny, monkeypatch):
    """What comes where two thirds of the memory are still too much. Each tile sees itself only (group norms,
    the middle's attention), so tiles differ; but every part is in its place: the tiled picture follows the
    whole one."""
    latent = {"samples": random_latent(1, (24, 16))}
    (whole,) = host.run("VAEDecode", samples=latent, vae=tiny.vae)
    decode, sizes = tiny.vae.first_stage_model.decode, set()

    def short(samples, **way):
        sizes.add(tuple(samples.shape[-2:]))
        if samples.shape[-2] * samples.shape[-1] > 8 * 8:
            raise torch.OutOfMemoryError("test")
        return decode(samples, **way)

    monkeypatch.setattr(tiny.vae.first_stage_model, "decode", short, raising=False)
    (tiled,) = host.run("VAEDecodeTiled", samples=latent, vae=tiny.vae, tile_size=128, overlap=32)
    monkeypatch.undo()
    assert (24, 16) in sizes and (8, 8) in sizes
    assert tiled.shape == whole.shape == (1, 384, 256, 3)
    # Random weights, so tiles differ more than a trained VAE's. Measured: 0.98, upside down 0.13.
    assert correlation(tiled, whole) > 0.9
    assert correlation(tiled.flip(1), whole) < 0.5
    pixels = torch.rand(1, 384, 256, 3)
    (encoded,) = host.run("VAEEncode", pixels=pixels, vae=tiny.vae)
    (tiled,) = host.run("VAEEncodeTiled", pixels=pixels, vae=tiny.vae, tile_size=128, overlap=32)
    assert tiled["samples"].shape == encoded["samples"].shape == (1, 128, 24, 16)
    assert correlation(tiled["samples"], encoded["samples"]) > 0.9


def test_all_of_it_is_loaded_however_little_is_asked_for(host, tiny_folder):
    """ComfyUI asks for a tenth of a byte with --novram; layers of plain torch would stay behind."""
    vae = host.module("nodes.host.vae").load_host_vae(tiny_folder)
    vae.patcher.partially_load(torch.device("cpu"), 0.1)
    assert vae.patcher.loaded_size() == vae.patcher.model_size()


def test_out_of_memory_falls_back_to_tiles(host, tiny, latent, monkeypatch):
    """ComfyUI's VAE retries in tiles; a picture that fits into one is the same one."""
    (want,) = host.run("LensVAEDecode", latent=latent, vae=tiny.vae)
    decode, seen = tiny.vae.first_stage_model.decode, []

    def fail_once(samples):
        seen.append(samples.shape)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("test")
        return decode(samples)

    monkeypatch.setattr(tiny.vae.first_stage_model, "decode", fail_once, raising=False)
    (image,) = host.run("LensVAEDecode", latent=latent, vae=tiny.vae)
    assert len(seen) > 1 and relative_l2(image, want) < 1e-5


def test_inpainting_encode(host, tiny):
    mask = torch.zeros(1, 96, 64)
    mask[:, 32:64, 16:48] = 1
    pixels = torch.rand(1, 96, 64, 3)
    (latent,) = host.run("VAEEncodeForInpaint", pixels=pixels, vae=tiny.vae, mask=mask, grow_mask_by=0)
    assert latent["samples"].shape == (1, 128, 6, 4)
    assert latent["noise_mask"].shape == (1, 1, 96, 64)


def test_every_attribute_of_comfyui_vae_is_there(host, tiny, full_vaes):
    """Nodes read attributes that comfy.sd.VAE's constructor sets; ours sets the same, by itself."""
    stock, ours, _ = full_vaes
    assert vars(stock).keys() - vars(ours).keys() == set()
    for name in ("latent_channels", "latent_dim", "output_channels", "downscale_ratio", "upscale_ratio"):
        assert getattr(ours, name) == getattr(stock, name), name
    assert ours.spacial_compression_decode() == 16 and ours.temporal_compression_decode() is None


@pytest.fixture(scope="module")
def full_vaes(host, own_models):
    """(ComfyUI's VAE, ours, the weights): 84 M random parameters of FLUX.2's VAE, all in fp32."""
    import comfy.sd
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        structure = AutoencoderKLFlux2()
    weights = random_weights(structure)
    save_file(weights, own_models / "vae" / "flux2_full.safetensors")
    (ours,) = host.run("LensVAELoader", vae_name="flux2_full.safetensors")
    stock = comfy.sd.VAE(sd=dict(weights), dtype=torch.float32)
    assert ours.vae_dtype == stock.vae_dtype == torch.float32
    return stock, ours, weights


def random_weights(structure) -> dict[str, torch.Tensor]:
    """Norms near 1, matrices with variance 1 / inputs, so that activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in structure.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name == "bn.num_batches_tracked":
            weights[name] = torch.tensor(1000)
        elif name == "bn.running_var":
            weights[name] = 1 + noise.abs()
        elif tensor.ndim == 1:
            weights[name] = 0.1 * noise + ("norm" in name and name.endswith("weight"))
        else:
            weights[name] = noise / math.sqrt(tensor[0].numel())
    return weights


def test_full_size_vae_decodes_like_comfyui(host, full_vaes):
    stock, ours, weights = full_vaes
    assert 83e6 < sum(tensor.numel() for tensor in weights.values()) < 85e6
    latent = {"samples": random_latent(1, (4, 6))}
    (want,) = host.run("LensVAEDecode", latent=latent, vae=stock)
    (got,) = host.run("LensVAEDecode", latent=latent, vae=ours)
    assert got.shape == want.shape == (1, 64, 96, 3) and want.std() > 0.05
    # Two fp32 implementations of some 60 convolutions; measured: 5e-7 and 7e-7 (encoding).
    assert relative_l2(got, want) < 1e-5


def test_full_size_vae_encodes_like_comfyui(host, full_vaes):
    stock, ours, _ = full_vaes
    pixels = torch.rand(1, 64, 96, 3)
    (want,) = host.run("VAEEncode", pixels=pixels, vae=stock)
    (got,) = host.run("VAEEncode", pixels=pixels, vae=ours)
    assert got["samples"].shape == want["samples"].shape == (1, 128, 4, 6)
    assert relative_l2(got["samples"], want["samples"]) < 1e-5


def test_pictures_go_through_either_vae(host, full_vaes):
    """LensImageToLatent with ComfyUI's own VAE, and with ours."""
    picture = {"image": torch.rand(1, 90, 30, 3), "base_resolution": "256", "fit": "pad"}
    results = [host.run("LensImageToLatent", vae=vae, **picture)[0] for vae in full_vaes[:2]]
    want, got = (latent["samples"] for latent in results)
    assert got.shape == want.shape == (1, 128, 22, 11) and results[0]["noise_mask"].shape == (1, 1, 22, 11)
    assert relative_l2(got, want) < 1e-5


def test_saved_weights_load_again(host, full_vaes, own_models):
    """What VAESave writes is a file for either loader."""
    import comfy.sd

    stock, ours, weights = full_vaes
    saved = {name: tensor.contiguous() for name, tensor in ours.get_sd().items()}
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    latent = random_latent(1, (1, 2))
    again = comfy.sd.VAE(sd=saved, dtype=torch.float32)
    assert torch.equal(again.decode(latent), stock.decode(latent))


def correlation(a, b) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
