"""Other nodes of ComfyUI on our MODEL, CLIP and VAE: as on its own Lens, or as without the node."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch

from lens_core.sampling import empirical_mu
from tests.compare import relative_l2
from tests.host.helpers import align_qk_eps, random_context, random_latent, write_lora

GRID = (6, 4)
# Some steps in the same fp32 arithmetic. Measured: 8e-7 at most.
SAME = 1e-5


@pytest.fixture(scope="module", autouse=True)
def more_nodes(host):
    """Nodes that ComfyUI loads beside its core ones."""
    import nodes

    names = (
        "apg",
        "cond",
        "differential_diffusion",
        "eps",
        "hooks",
        "model_merging",
        "multigpu",
    )
    for name in names:
        path = Path(nodes.__file__).parent / "comfy_extras" / f"nodes_{name}.py"
        assert asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras")), name


@pytest.mark.parametrize(
    "node_id, settings",
    [
        ("APG", {"eta": 0.5, "norm_threshold": 5.0, "momentum": 0.3}),
        ("CFGZeroStar", {}),
        ("Epsilon Scaling", {"scaling_factor": 1.05}),
        ("RescaleCFG", {"multiplier": 0.7}),
    ],
)
def test_model_patches(host, tiny, draw, stock_model, node_id, settings):
    """A patched MODEL draws what ComfyUI's own Lens draws with the same patch."""
    results = []
    for model in (tiny.model, stock_model):
        (patched,) = host.run(node_id, model=model, **settings)
        results.append(draw(model=patched, steps=8)["samples"])
    assert relative_l2(*results) < SAME
    assert relative_l2(results[0], draw(steps=8)["samples"]) > 1e-3, "the patch does nothing"


def test_differential_diffusion(host, tiny, draw, stock_model):
    latent = {"samples": random_latent(1, GRID), "noise_mask": torch.rand(1, 1, 96, 64)}
    results = []
    for model in (tiny.model, stock_model):
        (patched,) = host.run("DifferentialDiffusion", model=model)
        results.append(draw(model=patched, latent=latent, steps=8)["samples"])
    assert relative_l2(*results) < SAME
    assert relative_l2(results[0], draw(latent=latent, steps=8)["samples"]) > 1e-3


def test_merged_models(host, tiny, draw, load_tiny):
    """A model merged with itself is itself; with another it is between the two."""
    (same,) = host.run("ModelMergeSimple", model1=tiny.model, model2=load_tiny()[0], ratio=0.5)
    assert relative_l2(draw(model=same)["samples"], draw()["samples"]) < SAME
    turbo, *_ = host.run("LensModelLoader", model_name="Lens-Turbo-tiny", dtype="float32")
    (half,) = host.run("ModelMergeSimple", model1=tiny.model, model2=turbo, ratio=0.5)
    assert relative_l2(draw(model=half)["samples"], draw()["samples"]) > 0.1


def other() -> list:
    return [[random_context(1, 7, seed=3), {"pooled_output": None}]]


@pytest.mark.parametrize(
    "node_id, settings",
    [
        ("ConditioningAverage", {"conditioning_from": other(), "conditioning_to_strength": 0.5}),
        ("ConditioningConcat", {"conditioning_from": other()}),
        ("ConditioningCombine", {"conditioning_2": other()}),
        ("ConditioningSetAreaPercentage", {"width": 0.5, "height": 0.5, "x": 0, "y": 0.5, "strength": 1.0}),
        (
            "ConditioningSetMask",
            {"mask": torch.eye(96)[None, :, :64], "strength": 0.7, "set_cond_area": "default"},
        ),
        ("ConditioningSetTimestepRange", {"start": 0.0, "end": 0.5}),
        ("ConditioningZeroOut", {}),
    ],
)
def test_conditioning_nodes(host, tiny, draw, stock_model, node_id, settings):
    first = {"ConditioningAverage": "conditioning_to", "ConditioningConcat": "conditioning_to"}
    first["ConditioningCombine"] = "conditioning_1"
    key = first.get(node_id, "conditioning")
    (changed,) = host.run(node_id, **{key: tiny.positive}, **settings)
    # Shares of a run are counted along the MODEL's own schedule, which is another in ComfyUI's Lens.
    shift = empirical_mu(4096, 20)
    shifts = {"max_shift": shift, "base_shift": shift, "width": 1024, "height": 1024}
    (stock,) = host.run("ModelSamplingFlux", model=stock_model, **shifts)
    ours = draw(positive=changed, steps=4)["samples"]
    assert relative_l2(ours, draw(model=stock, positive=changed, steps=4)["samples"]) < SAME
    assert relative_l2(ours, draw(steps=4)["samples"]) > 1e-3, "the node does nothing"


def test_empty_negative_joins_other_conditioning(host, tiny, draw):
    """No tokens may be concatenated to some, and combined with some."""
    (joined,) = host.run("ConditioningConcat", conditioning_to=tiny.positive, conditioning_from=tiny.negative)
    assert torch.equal(draw(positive=joined)["samples"], draw()["samples"])
    (both,) = host.run("ConditioningCombine", conditioning_1=tiny.positive, conditioning_2=tiny.negative)
    assert relative_l2(draw(positive=both)["samples"], draw()["samples"]) > 1e-3


def test_lora_as_a_hook(host, tiny, draw, own_models):
    """A LoRA on the prompt alone, at cfg 1, is a LoRA on the model; afterwards it is gone."""
    write_lora(own_models / "loras" / "hook.safetensors", tiny.model.model.diffusion_model, 1.0)
    lora = {"lora_name": "hook.safetensors", "strength_model": 1.0}
    before = draw(cfg=1.0)["samples"]
    (hooks,) = host.run("CreateHookLoraModelOnly", **lora)
    settings = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks}
    (hooked,) = host.run("ConditioningSetProperties", cond_NEW=tiny.positive, **settings)
    (patched,) = host.run("LoraLoaderModelOnly", model=tiny.model, **lora)
    want = draw(model=patched, cfg=1.0)["samples"]
    assert relative_l2(draw(positive=hooked, cfg=1.0)["samples"], want) < SAME
    assert relative_l2(want, before) > 0.1
    assert torch.equal(draw(cfg=1.0)["samples"], before)


def test_clip_with_hooks(host, tiny, draw, own_models):
    """SetClipHooks encodes by schedule, another path through CLIP: the features are the same."""
    write_lora(own_models / "loras" / "clip_hook.safetensors", tiny.model.model.diffusion_model, 1.0)
    (hooks,) = host.run(
        "CreateHookLora", lora_name="clip_hook.safetensors", strength_model=1.0, strength_clip=1.0
    )
    (clip,) = host.run("SetClipHooks", clip=tiny.clip, hooks=hooks, apply_to_conds=True, schedule_clip=True)
    positive, _ = host.run("LensTextEncode", clip=clip, prompt="a red circle", negative="")
    assert torch.equal(positive[0][0], tiny.positive[0][0]) and positive[0][1]["hooks"]
    assert relative_l2(draw(positive=positive)["samples"], draw()["samples"]) > 0.1


def test_clip_skip_means_nothing(host, tiny):
    (clip,) = host.run("CLIPSetLastLayer", clip=tiny.clip, stop_at_clip_layer=-2)
    positive, _ = host.run("LensTextEncode", clip=clip, prompt="a red circle", negative="")
    assert torch.equal(positive[0][0], tiny.positive[0][0])


def test_device_selection(host, tiny, draw):
    """These nodes make models anew for a device."""
    (model,) = host.run("SelectModelDevice", model=tiny.model, device="cpu")
    (clip,) = host.run("SelectCLIPDevice", clip=tiny.clip, device="cpu")
    (vae,) = host.run("SelectVAEDevice", vae=tiny.vae, device="default")
    positive, negative = host.run("LensTextEncode", clip=clip, prompt="a red circle", negative="")
    latent = draw(model=model, positive=positive, negative=negative)
    assert torch.equal(latent["samples"], draw()["samples"])
    (image,) = host.run("LensVAEDecode", latent=latent, vae=vae)
    assert torch.equal(image, host.run("LensVAEDecode", latent=draw(), vae=tiny.vae)[0])


def test_saved_models_load_again(host, tiny, draw, own_models):
    """ModelSave, CLIPSave and VAESave write what our loaders read."""
    import folder_paths

    host.run("ModelSave", model=tiny.model, filename_prefix="lens_saved")
    host.run("CLIPSave", clip=tiny.clip, filename_prefix="encoder_saved")
    host.run("VAESave", vae=tiny.vae, filename_prefix="vae_saved")
    output = Path(folder_paths.get_output_directory())
    for stem, folder in (
        ("lens_saved", "diffusion_models"),
        ("encoder_saved", "text_encoders"),
        ("vae_saved", "vae"),
    ):
        [path] = output.rglob(f"{stem}*.safetensors")
        shutil.copy(path, own_models / folder / f"{stem}.safetensors")
    model, *_ = host.run("LensModelLoader", model_name="lens_saved.safetensors", dtype="float32")
    (clip,) = host.run("LensEncoderLoader", encoder_name="encoder_saved.safetensors", feature_cache=False)
    clip.load_model()
    (vae,) = host.run("LensVAELoader", vae_name="vae_saved.safetensors")
    for got, want in (
        (model.model, tiny.model.model),
        (clip.cond_stage_model, tiny.clip.cond_stage_model),
        (vae.first_stage_model, tiny.vae.first_stage_model),
    ):
        got, want = got.state_dict(), want.state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    # Tensors lie elsewhere in this file, which may change the order of a matrix product's sums.
    assert relative_l2(draw(model=model)["samples"], draw()["samples"]) < SAME
    assert clip.tokenize("a red circle") == tiny.clip.tokenize("a red circle")
    (conditioning,) = host.run("CLIPTextEncode", clip=clip, text="a red circle")
    assert torch.equal(conditioning[0][0], tiny.positive[0][0])


def test_encoder_is_saved_before_any_prompt(host, own_models):
    """CLIPSave of a folder that nothing has read yet; what is saved is a file of our loader's."""
    import folder_paths

    (clip,) = host.run("LensEncoderLoader", encoder_name="Lens-tiny", feature_cache=False)
    stem = "unread"
    host.run("CLIPSave", clip=clip, filename_prefix=stem)
    [path] = Path(folder_paths.get_output_directory()).rglob(f"{stem}*.safetensors")
    shutil.copy(path, own_models / "text_encoders" / f"{stem}.safetensors")
    (again,) = host.run("LensEncoderLoader", encoder_name=f"{stem}.safetensors", feature_cache=False)
    [[got, _]] = host.run("CLIPTextEncode", clip=again, text="a red circle")[0]
    [[want, _]] = host.run("CLIPTextEncode", clip=clip, text="a red circle")[0]
    assert torch.equal(got, want)


def test_saved_model_is_comfyui_own_lens(host, draw, tiny, own_models):
    """And UNETLoader reads the denoiser as its own."""
    import folder_paths

    host.run("ModelSave", model=tiny.model, filename_prefix="for_stock")
    [path] = Path(folder_paths.get_output_directory()).rglob("for_stock*.safetensors")
    shutil.copy(path, own_models / "diffusion_models" / "for_stock.safetensors")
    (model,) = host.run("UNETLoader", unet_name="for_stock.safetensors", weight_dtype="default")
    align_qk_eps(model.model.diffusion_model)
    assert relative_l2(draw(model=model)["samples"], draw()["samples"]) < SAME


def test_nvfp4_is_not_saved_again(host):
    """What a file of our own names for it would hold, neither ComfyUI nor our loader reads."""
    import folder_paths

    name = "gpt_oss_tiny_nvfp4.safetensors"
    (clip,) = host.run("LensEncoderLoader", encoder_name=name, feature_cache=False)
    with pytest.raises(Exception, match=f"nvfp4, which cannot be saved.* copy .*{name} instead") as caught:
        host.run("CLIPSave", clip=clip, filename_prefix="nvfp4_saved")
    assert type(caught.value).__name__ == "SettingError"
    assert not list(Path(folder_paths.get_output_directory()).rglob("nvfp4_saved*"))
