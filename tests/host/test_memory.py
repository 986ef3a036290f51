"""Our MODEL, CLIP and VAE under ComfyUI's memory manager: counted, loaded, offloaded, freed, cloned."""

from __future__ import annotations

import gc
import math
import sys
import weakref

import pytest
import torch

from lens_core.config import DenoiserConfig
from lens_core.tiny import models
from lens_core.vae.strips import CONV_WORKSPACE, MOMENTS_SCRATCH
from lens_core.weights import open_checkpoint
from tests.compare import relative_l2
from tests.host.helpers import random_context, random_latent

BYTES = {"F32": 4, "BF16": 2, "U8": 1, "I64": 8}
# A FLUX MODEL carries a table of 10000 noise levels in fp32 beside its network.
SIGMA_TABLE = 10000 * 4
CPU = torch.device("cpu")


@pytest.fixture
def management(host):
    import comfy.model_management

    return comfy.model_management


@pytest.fixture
def fresh(load_tiny):
    """(MODEL, CLIP, VAE) of this test alone."""
    return load_tiny()


def patchers(model, clip, vae):
    return model, clip.patcher, vae.patcher


def stored_bytes(path) -> int:
    """Bytes of a file's tensors as its header has them."""
    header = open_checkpoint(path).header
    return sum(math.prod(info.shape) * BYTES[info.dtype] for info in header.values())


def test_sizes_are_those_of_the_files(tiny, tiny_models, tiny_folder):
    """What ComfyUI plans with: every byte, the packed experts included, and none twice. Of the encoder,
    what may be on a GPU: its layers, each tensor from a multiple of 256 bytes on, and no embedding."""
    model, clip, vae = patchers(tiny.model, tiny.clip, tiny.vae)
    assert model.model_size() == stored_bytes(tiny_folder / "transformer") + SIGMA_TABLE
    header = open_checkpoint(tiny_models / "text_encoders" / "gpt_oss_tiny_mxfp4.safetensors").header
    layers = [info for name, info in header.items() if name.startswith("model.layers.")]
    assert clip.model_size() == sum(-(-info.nbytes // 256) * 256 for info in layers)
    packed = [buffer for name, buffer in clip.model.named_buffers() if name.endswith(("_blocks", "_scales"))]
    assert len(packed) == 24 * 4 and all(buffer.dtype == torch.uint8 for buffer in packed)
    assert vae.model_size() == tiny.vae.model_size() == stored_bytes(tiny_folder / "vae")


def test_load_and_unload_all(fresh, management, draw):
    before = draw()["samples"]
    loaded = patchers(*fresh)
    management.load_models_gpu(list(loaded))
    for patcher in loaded:
        assert any(patcher is other for other in management.loaded_models())
        assert patcher.loaded_size() == patcher.model_size()
    management.unload_all_models()
    assert not management.current_loaded_models
    assert all(patcher.loaded_size() == 0 for patcher in loaded)
    assert torch.equal(draw(model=fresh[0])["samples"], before)
    assert [model.model for model in management.loaded_models()] == [fresh[0].model]


def test_nodes_load_what_they_use(fresh, management, host, draw):
    model, clip, vae = fresh
    management.unload_all_models()
    positive, negative = host.run("LensTextEncode", clip=clip, prompt="x", negative="")
    assert [m.model for m in management.loaded_models()] == [clip.patcher.model]
    latent = draw(model=model, positive=positive, negative=negative)
    assert {m.model for m in management.loaded_models()} == {clip.patcher.model, model.model}
    host.run("LensVAEDecode", latent=latent, vae=vae)
    assert vae.patcher.model in [m.model for m in management.loaded_models()]


def test_clones_share_the_weights(tiny, draw):
    clone = tiny.model.clone()
    assert clone.model is tiny.model.model and clone.is_clone(tiny.model)
    assert torch.equal(draw(model=clone)["samples"], draw()["samples"])
    assert tiny.clip.clone().cond_stage_model is tiny.clip.cond_stage_model


def test_deleting_frees_without_the_garbage_collector(management, load_tiny, draw, host):
    """Nothing of ours is a cycle or keeps a model: 16 GB go back at once, not when Python finds time."""
    management.unload_all_models()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            model, clip, vae = load_tiny()
            latent = draw(model=model)
            host.run("LensTextEncode", clip=clip, prompt="x", negative="y")
            host.run("LensVAEDecode", latent=latent, vae=vae)
            modules = [weakref.ref(patcher.model) for patcher in patchers(model, clip, vae)]
            assert len(management.current_loaded_models) == 3
            del model, clip, vae
            assert [module() for module in modules] == [None, None, None]
            assert len(management.current_loaded_models) == 0
    finally:
        gc.enable()


def test_node_classes_and_modules_hold_nothing(host, tiny, draw):
    """Between runs only ComfyUI's cache and memory manager hold models."""
    from comfy.model_patcher import ModelPatcher

    draw()
    owners = [node for node_id, node in host.node_classes.items() if node_id.startswith("Lens")]
    owners += [module for name, module in sys.modules.items() if name.startswith(host.pack_name)]
    assert len(owners) > 30
    for owner in owners:
        for name, value in vars(owner).items():
            inside = value if isinstance(value, (list, tuple)) else [value]
            inside = value.values() if isinstance(value, dict) else inside
            held = [item for item in inside if isinstance(item, (torch.nn.Module, ModelPatcher))]
            assert not held, f"{owner}.{name}"


def made_anew(patcher, **kwargs):
    """A patcher from ``cached_patcher_init``, taken apart as ComfyUI's clone and deepclone do."""
    factory, arguments, *index = patcher.cached_patcher_init
    result = factory(*arguments, **kwargs)
    return result[index[0]] if index else result


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["model", "clip", "vae"])
@pytest.mark.parametrize("kwargs", [{}, {"disable_dynamic": True}], ids=["plain", "not_dynamic"])
def test_patcher_is_made_anew(tiny, kind, kwargs):
    old = patchers(tiny.model, tiny.clip, tiny.vae)[kind]
    new = made_anew(old, **kwargs)
    assert type(new) is type(old) and new.model is not old.model
    assert type(new.model) is type(old.model)
    for patcher in (old, new) if kind == 1 else ():
        patcher.load(CPU)  # the encoder's file is read when it is first needed
    want, got = old.model.state_dict(), new.model.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype, name
    assert new.cached_patcher_init[1] == old.cached_patcher_init[1]


def test_dtype_survives_being_made_anew(host):
    """A MODEL held in another dtype than ComfyUI would choose comes back in it."""
    model, *_ = host.run("LensModelLoader", model_name="Lens-tiny", dtype="bfloat16")
    assert made_anew(model).model_dtype() == model.model_dtype() == torch.bfloat16


def test_deep_clones_draw_the_same(tiny, draw):
    """ComfyUI makes them for several GPUs, and where a patch needs a model of its own."""
    want = draw()["samples"]
    deep = tiny.model.deepclone_multigpu(new_load_device=CPU)
    assert deep.model is not tiny.model.model
    assert torch.equal(draw(model=deep)["samples"], want)
    forced = tiny.model.clone(force_deepcopy=True, disable_dynamic=True)
    assert forced.model is not tiny.model.model
    assert torch.equal(draw(model=forced)["samples"], want)


def test_clip_deep_clone_encodes_the_same(tiny):
    deep = tiny.clip.patcher.deepclone_multigpu(new_load_device=CPU)
    ids = [token for token, _ in tiny.clip.tokenize("a red circle")["gpt_oss"][0]]
    tokens = {"gpt_oss": [[(token, 1.0) for token in ids]]}
    deep.model.set_clip_options({"execution_device": CPU})
    features, _, _ = deep.model.encode_token_weights(tokens)
    assert torch.equal(features, tiny.positive[0][0])


def load_partially(patcher, fraction: float) -> None:
    """What ComfyUI does on a small GPU without dynamic VRAM: only some layers move to it."""
    patcher.unpatch_model(CPU, unpatch_weights=True)
    patcher.patch_model(CPU, lowvram_model_memory=int(fraction * patcher.model_size()))
    assert patcher.model.model_lowvram
    assert patcher.loaded_size() < patcher.model_size()


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_partly_loaded_model_gives_the_same(fresh, tiny, fraction):
    model = fresh[0]
    x, sigma, context = random_latent(1, (5, 3)), torch.tensor([0.7]), random_context(1, 6)
    load_partially(model, fraction)
    got = model.model.diffusion_model(x, sigma, context)
    assert torch.equal(got, tiny.model.model.diffusion_model(x, sigma, context))


def test_partly_loaded_model_takes_patches(fresh, tiny):
    """A LoRA on layers that stay offloaded is applied as they are used."""
    model = fresh[0].clone()
    key = "diffusion_model.transformer_blocks.1.attn.img_qkv.weight"
    difference = 0.1 * torch.randn_like(model.model.state_dict()[key])
    assert model.add_patches({key: ("diff", (difference,))}) == [key]
    x, sigma, context = random_latent(1, (5, 3)), torch.tensor([0.7]), random_context(1, 6)
    load_partially(model, 0.01)
    got = model.model.diffusion_model(x, sigma, context)
    model.unpatch_model(CPU)
    model.patch_model(CPU)
    assert not model.model.model_lowvram
    want = model.model.diffusion_model(x, sigma, context)
    assert relative_l2(got, want) < 1e-6
    assert relative_l2(got, tiny.model.model.diffusion_model(x, sigma, context)) > 1e-3


def test_vae_is_loaded_as_a_whole(tiny, management, monkeypatch):
    """Its plain torch layers cannot compute with weights that stayed elsewhere."""
    load, seen = management.load_models_gpu, []

    def spy(models, **kwargs):
        seen.append(kwargs["force_full_load"])
        return load(models, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", spy)
    tiny.vae.decode(torch.zeros(1, 128, 1, 1))
    tiny.vae.encode(torch.zeros(1, 16, 16, 3))
    tiny.vae.decode_tiled(torch.zeros(1, 128, 1, 1))
    tiny.vae.encode_tiled(torch.zeros(1, 16, 16, 3))
    assert seen == [True] * 4


def test_denoiser_estimate(tiny):
    """A token of the picture counts as one of the text; here in fp32, and without our kernels."""
    of_token = (2 * models.DENOISER.mlp_hidden_size + 8 * models.DENOISER.hidden_size) * 2 * 4
    need = tiny.model.model.memory_required
    text = {"c_crossattn": [[1, 100, 256]]}
    one = need([1, 128, 32, 32], text)
    assert need([1, 128, 64, 32], text) - one == 32 * 32 * of_token
    assert need([1, 128, 32, 32], {"c_crossattn": [[1, 100, 256], [1, 150, 256]]}) - one == 50 * of_token
    assert need([2, 128, 32, 32], text) - one == (32 * 32 + 100) * of_token
    assert need([1, 128, 32, 32]) - one == 412 * of_token, "unknown text counts as the longest"
    assert tiny.model.memory_required([1, 128, 32, 32]) == need([1, 128, 32, 32])


def test_denoiser_estimate_of_prompt_and_negative(tiny):
    """ComfyUI asks for twice the pictures; only where both texts are of one length do they run together."""
    from comfy.sampler_helpers import convert_cond, estimate_memory

    def estimate(*lengths: int) -> tuple[float, float]:
        conds = {str(i): convert_cond([[torch.zeros(1, n, 256), {}]]) for i, n in enumerate(lengths)}
        return estimate_memory(tiny.model, (3, 128, 32, 32), conds)

    together, least = estimate(7, 7)
    assert together > 1.9 * least
    apart, same_least = estimate(7, 5)
    assert apart == same_least == least
    of_token = (2 * models.DENOISER.mlp_hidden_size + 8 * models.DENOISER.hidden_size) * 2 * 4
    assert estimate(5, 5, 7)[0] - together == 0 and estimate(8, 8)[0] - together == 6 * of_token


def test_generic_estimate_is_near_ours(tiny):
    """Of ComfyUI's formula, which other packs use too: that of our kernels, in bf16."""
    from lens_core.memory.estimate import denoiser_bytes

    of_token = tiny.model.model.memory_usage_factor * 2 * 0.01 * 2**20
    ours = denoiser_bytes(DenoiserConfig(), batch=1, image_tokens=4096, text_tokens=200, levels=20)
    assert 4096 * of_token == pytest.approx(ours, rel=0.2)


def test_encoding_is_estimated_by_its_own_arithmetic(tiny):
    """The picture's own bytes come on top: ComfyUI brings it to the GPU. Sides are whole tokens."""
    estimate, encode_bytes = tiny.vae.memory_used_encode, tiny.vae.first_stage_model.encode_bytes
    for batch, height, width in ((1, 1024, 768), (4, 1024, 768), (1, 1009, 765)):
        need = estimate((batch, 3, height, width), torch.bfloat16)
        picture = 3 * height * width * 2
        assert need - picture == int(1.3 * encode_bytes(64, 48, 2))
    assert estimate((1, 3, 64, 64), torch.float32) > estimate((1, 3, 64, 64), torch.bfloat16)


def test_decoding_is_estimated_by_its_own_arithmetic(tiny):
    """ComfyUI takes as many pictures at once as fit; ours come one by one, so one's peak is the need."""
    estimate, decode_bytes = tiny.vae.memory_used_decode, tiny.vae.first_stage_model.decode_bytes
    for batch in (1, 4):
        need = estimate((batch, 128, 64, 48), torch.bfloat16)
        assert need == pytest.approx(1.3 * decode_bytes(64, 48, 2), abs=1)
    workspace = 1.3 * (CONV_WORKSPACE + MOMENTS_SCRATCH)  # of a tiny VAE's need the most, in either dtype
    assert estimate((1, 128, 64, 48), torch.float32) - workspace > 1.3 * (need - workspace)
