"""Loading as under dynamic VRAM, ComfyUI's default on CUDA, as far as a CPU goes.

Covered: layers made without weights (ComfyUI's lazy Linear and Embedding) are filled strictly by our
loaders; ComfyUI's own dynamic patcher runs its load over our modules and tells what it would move to
the GPU as a whole. Replaced: reading by comfy-aimdo's file maps (a plain reader stands in) and its
pinned host buffers (of no size). Not covered, for want of CUDA: weights that stream from the file while
a layer computes, and the address space that holds them.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.host.fake_gpu import NoHostBuffer


def plain_reader(path, return_metadata=False, **_):
    """In place of comfy.utils.load_torch_file, which would map files with comfy-aimdo."""
    return (load_file(path), {}) if return_metadata else load_file(path)


@pytest.fixture
def lazy(host, monkeypatch):
    """ComfyUI makes layers without weights, and files are read by a plain reader."""
    import comfy.memory_management
    import comfy.utils

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.utils, "load_torch_file", plain_reader)


@pytest.fixture
def dynamic(lazy, monkeypatch):
    """Besides, models get ComfyUI's dynamic patcher, which otherwise steps aside on a CPU."""
    import comfy.model_patcher
    import comfy_aimdo.host_buffer

    patcher = comfy.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(patcher, "__new__", lambda cls, *_, **__: object.__new__(cls))
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", NoHostBuffer)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", patcher)


def test_layers_are_lazy_here(lazy):
    """What the tests below rely on."""
    import comfy.ops

    for operations in (comfy.ops.disable_weight_init, comfy.ops.manual_cast):
        assert operations.Linear(4, 4, device="meta").weight is None
        assert operations.Embedding(4, 4).weight.is_meta


def assert_same_weights(got, want) -> None:
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys() and got
    for name in want:
        assert got[name] is not None and not got[name].is_meta, name
        assert torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype, name


def test_loaders_fill_lazy_layers(lazy, tiny, load_tiny):
    model, clip, vae = load_tiny()
    assert_same_weights(model.model, tiny.model.model)
    for encoder in (clip, tiny.clip):
        encoder.load_model()  # its file is read when it is first needed
    assert_same_weights(clip.cond_stage_model, tiny.clip.cond_stage_model)
    assert_same_weights(vae.first_stage_model, tiny.vae.first_stage_model)
    assert model.model_size() == tiny.model.model_size()
    assert clip.patcher.model_size() == tiny.clip.patcher.model_size()


def test_single_files_fill_lazy_layers(lazy, host):
    model, *_ = host.run("LensModelLoader", model_name="lens_tiny_bf16.safetensors", dtype="bfloat16")
    tensors = model.model.diffusion_model.state_dict()
    assert tensors and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("transformer_blocks.1.img_mlp.w2.weight"), "Missing (1)"),
        (lambda w: w.pop("proj_out.bias"), "Missing (1): proj_out.bias"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), "Unexpected (1): extra.weight"),
        (lambda w: w.update({"txt_in.weight": torch.zeros(3, 3)}), "txt_in.weight should be [128, 256]"),
    ],
    ids=["weight", "bias", "extra", "shape"],
)
def test_lazy_layers_are_filled_strictly(lazy, host, own_models, tiny_models, change, message):
    """A lazy layer itself takes any shape and fills gaps with zeros; the loader must not let it."""
    weights = load_file(tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors")
    change(weights)
    save_file(weights, own_models / "diffusion_models" / "lazy_odd.safetensors")
    with pytest.raises(Exception) as caught:
        host.run("LensModelLoader", model_name="lazy_odd.safetensors", dtype="auto")
    assert type(caught.value).__name__ == "CheckpointMismatch"
    assert message in str(caught.value)


def test_lazy_layers_compute_the_same(host, tiny, draw, monkeypatch, load_tiny, lazy):
    model, clip, vae = load_tiny()
    import comfy.memory_management

    # From here on as usual: only loading was lazy.
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", False)
    positive, negative = host.run("LensTextEncode", clip=clip, prompt="a red circle", negative="")
    assert torch.equal(positive[0][0], tiny.positive[0][0])
    latent = draw(model=model, positive=positive, negative=negative)
    want = draw()
    assert torch.equal(latent["samples"], want["samples"])
    assert torch.equal(vae.decode(latent["samples"]), tiny.vae.decode(want["samples"]))


def test_dynamic_patcher_draws_the_same(host, tiny, draw, dynamic, load_tiny):
    want = draw()["samples"]
    model, clip, vae = load_tiny()
    assert model.is_dynamic()
    assert not vae.is_dynamic(), "its convolutions are plain torch modules, which cannot stream"
    positive, negative = host.run("LensTextEncode", clip=clip, prompt="a red circle", negative="")
    assert torch.equal(positive[0][0], tiny.positive[0][0])
    latent = draw(model=model, positive=positive, negative=negative)
    assert torch.equal(latent["samples"], want)
    (image,) = host.run("LensVAEDecode", latent=latent, vae=vae)
    assert torch.equal(image, tiny.vae.decode(want))


def test_not_dynamic_delegate_of_a_dynamic_model(tiny, draw, dynamic, load_tiny):
    """ComfyUI asks for one where a node's hooks need plain weights."""
    want = draw()["samples"]
    model, _, _ = load_tiny()
    delegate = model.get_non_dynamic_delegate()
    assert not delegate.is_dynamic() and delegate.model is not model.model
    assert_same_weights(delegate.model, model.model)
    assert torch.equal(draw(model=delegate)["samples"], want)


def test_denoiser_streams_under_dynamic_vram(dynamic, load_tiny):
    """Only norms and small layers are moved to the GPU at once, as the model is prepared; in the tiny
    model those are a larger share."""
    model, _, _ = load_tiny()
    comfy_load([model])
    assert model.model.model_loaded_weight_memory < 0.1 * model.model_size()


def test_encoder_is_never_dynamic(dynamic, load_tiny):
    """It places whole layers itself: ComfyUI would move packed experts, 10 of its 13 GB, in one piece."""
    patcher = load_tiny()[1].patcher
    assert not patcher.is_dynamic() and not patcher.clone().is_dynamic()


def test_patch_under_dynamic_vram(host, tiny, dynamic, load_tiny, own_models):
    """Patches on small layers are merged as the model is prepared, and gone with their clone."""
    name = "transformer_blocks.0.img_norm1"
    save_file({f"diffusion_model.{name}.diff": torch.ones(128)}, own_models / "loras" / "diff.safetensors")
    model = load_tiny()[0]
    (patched,) = host.run(
        "LoraLoaderModelOnly", model=model, lora_name="diff.safetensors", strength_model=0.5
    )
    assert patched.is_dynamic() and len(patched.patches) == 1
    before = tiny.model.model.diffusion_model.get_submodule(name).weight
    for patcher, want in ((patched, before + 0.5), (model, before)):
        comfy_load([patcher])
        torch.testing.assert_close(patcher.model.diffusion_model.get_submodule(name).weight.data, want)


def comfy_load(patchers) -> None:
    import comfy.model_management

    comfy.model_management.load_models_gpu(patchers)
