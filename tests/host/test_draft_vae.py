"""taef2 in LensVAELoader: a tiny decoder by ComfyUI's own class, listed where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.host.helpers import random_latent
from tests.host.test_nodes import choices


@pytest.fixture
def approx(host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/vae_approx of this test alone."""
    import folder_paths

    kinds = folder_paths.folder_names_and_paths["vae_approx"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], kinds))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def network(approx: Path):
    """ComfyUI's network with random weights, its decoder in the folder."""
    from comfy.taesd.taesd import TAESD

    network = TAESD(latent_channels=128).eval()
    generator = torch.Generator().manual_seed(1)
    for value in network.state_dict().values():
        if value.ndim:
            value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
    save_file(network.taesd_decoder.state_dict(), approx / "taef2_decoder.safetensors")
    return network


def test_it_is_listed_where_it_is(host, approx: Path, request: pytest.FixtureRequest):
    assert "taef2" not in choices(host, "LensVAELoader")
    with pytest.raises(
        host.module("lens_core.errors").CheckpointError, match=r"no taef2_decoder\.safetensors"
    ):
        host.run("LensVAELoader", vae_name="taef2")
    request.getfixturevalue("network")
    assert choices(host, "LensVAELoader")[-1] == "taef2"
    assert host.node_classes["LensVAELoader"].validate_inputs(vae_name="taef2") is True


def test_it_decodes_as_the_network_does(host, network, caplog: pytest.LogCaptureFixture):
    (vae,) = host.run("LensVAELoader", vae_name="taef2")
    latent = random_latent(2, (3, 5))
    (pictures,) = host.run("LensVAEDecode", latent={"samples": latent}, vae=vae)
    wanted = (network.decode(latent).movedim(1, -1) + 1) / 2
    assert pictures.shape == (2, 48, 80, 3) and wanted.std() > 0.05
    # The same arithmetic in the same type, and clamped.
    torch.testing.assert_close(pictures, wanted.clamp(0, 1), atol=1e-5, rtol=0)
    assert "Missing VAE keys" not in caplog.text
    with pytest.raises(host.module("lens_core.errors").SettingError, match=r"only decodes\. Use flux2-vae"):
        vae.encode(pictures)


def test_with_the_encoder_it_encodes(host, network, approx: Path):
    save_file(network.taesd_encoder.state_dict(), approx / "taef2_encoder.safetensors")
    (vae,) = host.run("LensVAELoader", vae_name="taef2")
    image = torch.rand(1, 48, 80, 3)
    wanted = network.encode(image.movedim(-1, 1) * 2 - 1)
    assert wanted.shape == (1, 128, 3, 5)
    torch.testing.assert_close(vae.encode(image), wanted, atol=1e-5, rtol=0)


def test_another_file_under_its_name_is_named(host, network, approx: Path):
    weights = network.taesd_decoder.state_dict()
    weights.pop("1.weight")
    save_file({**weights, "1.bias": torch.zeros(3)}, approx / "taef2_decoder.safetensors")
    mismatch = host.module("lens_core.errors").CheckpointMismatch
    with pytest.raises(mismatch, match=r"Missing \(1\): taesd_decoder\.1\.weight.*1\.bias should be \[64\]"):
        host.run("LensVAELoader", vae_name="taef2")
