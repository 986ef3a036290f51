"""What goes wrong is said in one sentence: what was expected, what came, what to do. Then all works."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.compare import relative_l2


@pytest.fixture(scope="module")
def baseline(draw):
    return draw()["samples"]


@pytest.fixture
def fails(draw, baseline):
    """Calls something that must raise a LensError whose message has all the words; afterwards a
    normal picture is drawn as ever."""

    def check(kind: str, words: list[str], call, *args, **kwargs) -> None:
        # The pack's classes are other objects than the tests' own import of lens_core.
        with pytest.raises(Exception) as caught:
            call(*args, **kwargs)
        classes = [cls.__name__ for cls in type(caught.value).__mro__]
        assert classes[0] == kind and "LensError" in classes, caught.value
        message = str(caught.value)
        lacking = [word for word in words if word not in message]
        assert not lacking, message
        assert "\n" not in message and message[-1] == "." and len(message) < 500, message
        assert torch.equal(draw()["samples"], baseline)

    return check


def conditioning(width: int, tokens: int = 5) -> list:
    return [[torch.randn(1, tokens, width), {}]]


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("which", ["positive", "negative"])
def test_conditioning_of_another_model(draw, fails, which, cfg):
    """768 is CLIP-L's width; the tiny denoiser takes 256. At cfg 1 a wrong negative is named too:
    ComfyUI prepares both, and the next run at another cfg would need it."""
    words = [which, "[1, 5, 768]", "[batch, tokens, 256]", "LensEncoderLoader", "type 'lens'"]
    fails("SettingError", words, draw, cfg=cfg, **{which: conditioning(768)})


def test_conditioning_of_another_model_in_stock_ksampler(host, tiny, fails):
    fails(
        "SettingError",
        ["[1, 5, 4096]", "[batch, tokens, 256]"],
        host.run,
        "KSampler",
        model=tiny.model,
        seed=1,
        steps=1,
        cfg=5.0,
        sampler_name="euler",
        scheduler="simple",
        positive=conditioning(4096),
        negative=tiny.negative,
        latent_image={"samples": torch.zeros(1, 128, 6, 4)},
        denoise=1.0,
    )


def test_conditioning_of_another_model_with_comfyui_own_lens(draw, fails, stock_model):
    """LensSampler takes ComfyUI's own MODEL too; its user reads the same sentence."""
    words = ["[1, 5, 768]", "[batch, tokens, 256]", "LensEncoderLoader"]
    fails("SettingError", words, draw, model=stock_model, positive=conditioning(768))


class Flux:
    """Stands for another model's BaseModel."""


@pytest.fixture
def other_model():
    return SimpleNamespace(model=Flux(), model_options={"transformer_options": {}})


def test_another_model(draw, fails, other_model):
    words = ["Flux", "samples Lens only", "LensModelLoader", "UNETLoader", "KSampler"]
    fails("SettingError", words, draw, model=other_model)


def test_another_model_in_the_guider(host, tiny, fails, other_model):
    conds = {"positive": tiny.positive, "negative": tiny.negative}
    fails("SettingError", ["Flux"], host.run, "LensGuider", model=other_model, cfg=5.0, **conds)


@pytest.mark.parametrize(
    "samples, shape",
    [
        (torch.ones(1, 4, 64, 64), "[1, 4, 64, 64]"),
        (torch.ones(1, 16, 64, 64), "[1, 16, 64, 64]"),
        (torch.zeros(1, 4, 64, 64), "[1, 4, 64, 64]"),  # empty, but nothing says its scale
        (torch.zeros(1, 128, 1, 6, 4), "[1, 128, 1, 6, 4]"),
    ],
    ids=["sd", "flux", "empty_without_ratio", "video"],
)
def test_latent_of_another_model(host, draw, fails, samples, shape):
    words = [shape, "[batch, 128, height / 16, width / 16]", "LensEmptyLatent"]
    fails("SettingError", words, draw, latent={"samples": samples})
    scheduler = {"steps": 4, "latent": {"samples": samples}, "denoise": 1.0}
    fails("SettingError", words, host.run, "LensScheduler", **scheduler)


def test_a_pictures_latent_of_another_model_is_no_empty_one(draw, fails):
    """EmptyLatentImage's keys with something drawn in it."""
    latent = {"samples": torch.ones(1, 4, 64, 64), "downscale_ratio_spacial": 8}
    fails("SettingError", ["[1, 4, 64, 64]", "128"], draw, latent=latent)


@pytest.mark.parametrize("grid, size", [((4, 12), "192x64"), ((13, 6), "96x208"), ((1, 3), "48x16")])
def test_ratio(draw, fails, grid, size):
    words = [f"{size} pixels", "1:2 to 2:1", "Try "]
    fails("SizeError", words, draw, latent={"samples": torch.zeros(1, 128, *grid)})


@pytest.mark.parametrize("width, height, fit", [(1000, 1000, "992x992"), (512, 520, "512x512")])
def test_size_between_tokens(host, draw, fails, width, height, fit):
    (latent,) = host.run("EmptyLatentImage", width=width, height=height, batch_size=1)
    words = [f"{width}x{height} pixels", "multiples of 16", f"Try {fit}"]
    fails("SizeError", words, draw, latent=latent)


@pytest.mark.parametrize("steps", [0, -3])
def test_steps(host, draw, fails, steps):
    """ComfyUI checks a widget's range, but not a connected value's."""
    words = ["steps", "at least 1", str(steps)]
    fails("SettingError", words, draw, steps=steps)
    latent = {"samples": torch.zeros(1, 128, 6, 4)}
    fails("SettingError", words, host.run, "LensScheduler", steps=steps, latent=latent, denoise=1.0)


@pytest.mark.parametrize("denoise", [-0.1, 1.5])
def test_denoise(draw, fails, denoise):
    fails("SettingError", ["denoise", "between 0 and 1", str(denoise)], draw, denoise=denoise)


def test_decoding_another_models_latent(host, tiny, fails):
    latent = {"samples": torch.zeros(1, 4, 64, 64)}
    words = ["[1, 4, 64, 64]", "128", "LensVAELoader", "flux2-vae"]
    fails("SettingError", words, host.run, "LensVAEDecode", latent=latent, vae=tiny.vae)


def test_decoding_with_another_models_vae(host, fails):
    vae = SimpleNamespace(latent_channels=4)
    latent = {"samples": torch.zeros(1, 128, 6, 4)}
    words = ["[1, 128, 6, 4]", "decodes 4 channels", "LensVAELoader"]
    fails("SettingError", words, host.run, "LensVAEDecode", latent=latent, vae=vae)


def test_no_clip(host, fails):
    words = ["No text encoder", "LensEncoderLoader", "CLIPLoader"]
    fails("SettingError", words, host.run, "LensTextEncode", clip=None, prompt="x", negative="")


LOADERS = {
    "diffusion_models": ("LensModelLoader", {"dtype": "auto"}, "model_name"),
    "text_encoders": ("LensEncoderLoader", {}, "encoder_name"),
    "vae": ("LensVAELoader", {}, "vae_name"),
}


def load(host, folder: str, name: str):
    node, more, key = LOADERS[folder]
    return host.run(node, **more, **{key: name})


@pytest.mark.parametrize(
    "folder, tensor, words",
    [
        (
            "diffusion_models",
            "double_blocks.0.img_attn.qkv.weight",
            ["a FLUX denoiser", "expected a Lens denoiser", "Choose"],
        ),
        (
            "diffusion_models",
            "diffusion_model.transformer_blocks.0.attn.img_qkv.lora_A.weight",
            ["a LoRA", "expected a Lens denoiser"],
        ),
        (
            "text_encoders",
            "text_model.encoder.layers.0.mlp.fc1.weight",
            ["a CLIP text encoder", "expected a GPT-OSS encoder", "Choose"],
        ),
        (
            "vae",
            "decoder.conv_in.weight",
            ["a VAE of another model", "expected a FLUX.2 VAE", "flux2-vae"],
        ),
    ],
    ids=["flux", "lora", "clip", "sd_vae"],
)
def test_file_of_another_model(host, own_models, fails, folder, tensor, words):
    name = f"other_{tensor.split('.')[0]}.safetensors"
    save_file({tensor: torch.zeros(4, 4)}, own_models / folder / name)
    fails("CheckpointError", [name, *words], load, host, folder, name)


@pytest.mark.parametrize("folder", LOADERS)
def test_cut_file(host, own_models, tiny_models, fails, folder):
    whole = {
        "diffusion_models": "lens_tiny_bf16.safetensors",
        "text_encoders": "gpt_oss_tiny_mxfp4.safetensors",
        "vae": "flux2_tiny_vae.safetensors",
    }[folder]
    content = (tiny_models / folder / whole).read_bytes()
    (own_models / folder / "cut.safetensors").write_bytes(content[: len(content) // 2])
    words = ["cut.safetensors", "cut short", "again"]
    fails("CheckpointError", words, load, host, folder, "cut.safetensors")


def test_file_that_lacks_tensors(host, own_models, tiny_models, fails):
    weights = load_file(tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors")
    del weights["transformer_blocks.1.attn.norm_q.weight"]
    weights["proj_out.bias"] = torch.zeros(7)
    weights["extra.weight"] = torch.zeros(1)
    save_file(weights, own_models / "diffusion_models" / "odd.safetensors")
    words = [
        "odd.safetensors",
        "Missing (1): transformer_blocks.1.attn.norm_q.weight",
        "Unexpected (1): extra.weight",
        "proj_out.bias should be [128], is [7]",
    ]
    fails("CheckpointMismatch", words, load, host, "diffusion_models", "odd.safetensors")


@pytest.mark.parametrize("folder", LOADERS)
def test_file_that_is_gone(host, fails, folder):
    """A workflow from another machine."""
    words = ["'elsewhere.safetensors'", f"models/{folder}", "models/lens", "_tiny_", "press R"]
    fails("CheckpointError", words, load, host, folder, "elsewhere.safetensors")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "..", "/etc/passwd", ""])
def test_names_do_not_leave_the_folders(host, own_models, fails, name):
    """The server passes on what a request says; only listed places are opened."""
    save_file({"x": torch.zeros(1)}, own_models.parent / "secret.safetensors")
    fails("CheckpointError", [repr(name)], load, host, "diffusion_models", name)


def test_error_texts_reach_the_user_whole(host, tiny, draw, caplog):
    """An empty prompt is no error: it is drawn, with a warning."""
    positive, negative = host.run("LensTextEncode", clip=tiny.clip, prompt=" ", negative="")
    latents = draw(positive=positive, negative=negative)["samples"]
    assert "prompt is empty" in caplog.text
    assert relative_l2(latents, draw()["samples"]) > 0.01
