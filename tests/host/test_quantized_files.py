"""Files that are quantised already, under ComfyUI: LensModelLoader reads each, and draws what lens_core does.

ComfyUI's own UNETLoader reads its own formats too, and our sampler draws with that model.
"""

from __future__ import annotations

import logging

import pytest
import torch

from lens_core.loading import load_denoiser
from lens_core.sampling import grid_to_tokens, tokens_to_grid
from tests import denoiser_gguf
from tests import denoiser_quantized as files
from tests.compare import relative_l2
from tests.host.helpers import align_qk_eps, random_context, random_latent, write_lora

SIZE = (6, 4)


def comfy(kind, **changes):
    return f"{kind.replace(' ', '_')}.safetensors", lambda path: files.write_comfy(path, kind, **changes)


def gguf(kind):
    return f"{kind}.gguf", lambda path: denoiser_gguf.write_denoiser(path, kind)


# File name and writer; a folder goes into models/lens.
LAYOUTS = {
    **{kind: comfy(kind) for kind in files.COMFY},
    "prefix": (
        "prefix.safetensors",
        lambda path: files.write_comfy(path, "mxfp8", prefix="model.diffusion_model."),
    ),
    "metadata": ("metadata.safetensors", lambda path: files.write_comfy(path, "nvfp4", in_metadata=True)),
    "input_scale": (
        "input.safetensors",
        lambda path: files.write_comfy(path, "float8_e4m3fn", input_scale=True),
    ),
    "every layer": (
        "all.safetensors",
        lambda path: files.write_comfy(path, "mxfp8", which=lambda layer: True),
    ),
    "scaled": ("scaled.safetensors", files.write_scaled),
    "scaled, full precision": ("scaled2.safetensors", lambda path: files.write_scaled(path, mark=2)),
    "unscaled": ("unscaled.safetensors", files.write_unscaled),
    "sdnq": ("Lens-SDNQ", files.write_sdnq),
    **{kind: gguf(kind) for kind in ("Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K")},
}


@pytest.fixture(scope="module")
def written(own_models):
    """Writes a layout into ComfyUI's folders once; -> its option and its path."""
    done = {}

    def run(layout):
        if layout not in done:
            name, write = LAYOUTS[layout]
            name = f"lens_quantized_{name}"
            path = own_models / ("lens" if layout == "sdnq" else "diffusion_models") / name
            write(path)
            done[layout] = name, path
        return done[layout]

    return run


@pytest.fixture(scope="module")
def load(host, written):
    """A layout as a MODEL."""

    def run(layout, dtype="bfloat16", quantization="none"):
        model, *_ = host.run(
            "LensModelLoader", model_name=written(layout)[0], dtype=dtype, quantization=quantization
        )
        return model

    return run


def inputs(dtype):
    sigma = torch.tensor([0.7], dtype=dtype)
    return random_latent(1, SIZE).to(dtype), sigma, random_context(1, 7).to(dtype)


def velocity(denoiser, dtype):
    """lens_core's."""
    x, sigma, context = inputs(dtype)
    text = context.unflatten(-1, (denoiser.config.num_text_layers, denoiser.config.enc_hidden_dim))
    return tokens_to_grid(denoiser(grid_to_tokens(x), sigma, text, SIZE), SIZE)


def velocities(model, path, dtype):
    """MODEL's, and lens_core's from the same file."""
    return model.model.diffusion_model(*inputs(dtype)), velocity(load_denoiser(path, dtype), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_is_offered_and_draws_the_same_picture_twice(host, written, load, draw, layout):
    name, _ = written(layout)
    (choice,) = [
        put for put in host.node_classes["LensModelLoader"].define_schema().inputs if put.id == "model_name"
    ]
    assert name in choice.options
    model = load(layout)
    picture = draw(model=model)["samples"]
    assert picture.isfinite().all() and picture.std() > 0.1
    assert torch.equal(draw(model=model)["samples"], picture)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_velocity_is_lens_cores(load, written, layout):
    got, want = velocities(load(layout, "float32"), written(layout)[1], torch.float32)
    # Two fp32 implementations of the same products: 2.1e-7 measured, ten times that as for plain weights. Of
    # inputs in 8 bits the last bit decides some now and then, other ones on another CPU: 3e-4, turned 9e-4.
    assert relative_l2(got, want) < (5e-3 if "int8" in layout or "turned" in layout else 2e-6)


@pytest.fixture(scope="module")
def plain_apart(host, tiny_models):
    """How far host and core are in bf16 without quantisation."""
    name = "lens_tiny_bf16.safetensors"
    model, *_ = host.run("LensModelLoader", model_name=name, dtype="bfloat16")
    return relative_l2(*velocities(model, tiny_models / "diffusion_models" / name, torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_velocity_is_lens_cores_in_bf16(load, written, plain_apart, layout):
    """Attention rounds otherwise here, and 8-bit inputs are rounded at another place for it."""
    got, want = velocities(load(layout), written(layout)[1], torch.bfloat16)
    # Measured: 0.0043 without quantisation, the same where weights alone are quantised, 0.011 at most.
    assert 1e-3 < plain_apart < 1e-2
    assert relative_l2(got, want) < 4 * plain_apart


# How far the pictures may be apart, both in fp32. Where ComfyUI multiplies the weights as they are, as we do:
# two fp32 implementations, as above. Both quantise inputs to 8-bit integers, of which the last bit decides
# some: 1.3e-3 measured. On a CPU ComfyUI does not quantise inputs to 8-bit floats, which is 1 %; but it does
# to 4-bit integers, which is 4 %.
SAME, INTEGERS, FLOATS, FOUR_BITS = 2e-6, 5e-3, 2e-2, 1e-1
READ_BY_COMFYUI = {
    "float8_e4m3fn": FLOATS,
    "float8_e5m2": SAME,
    "int8_tensorwise": INTEGERS,
    "int8 by row": INTEGERS,
    "int8 turned": INTEGERS,
    "int8 turned, as params": INTEGERS,
    "convrot_w4a4": FOUR_BITS,
    "mxfp8": SAME,
    "nvfp4": SAME,
    "prefix": SAME,
    "metadata": SAME,
    "input_scale": FLOATS,
    "every layer": SAME,
    "scaled": FLOATS,
    "scaled, full precision": SAME,
    "unscaled": SAME,
}


@pytest.mark.parametrize("layout", READ_BY_COMFYUI)
def test_our_sampler_draws_with_comfyuis_own_loader(host, written, load, draw, layout, monkeypatch):
    # comfy-kitchen's product of integers on a CPU. PyTorch's saturates where the CPU has no VNNI (2 % off).
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int())
    model, *_ = host.run("UNETLoader", unet_name=written(layout)[0], weight_dtype="default")
    align_qk_eps(model.model.diffusion_model)
    # Without guidance: comfy-kitchen's integers have no product with the empty text of a blank negative.
    got, want = (draw(model=each, cfg=1.0)["samples"] for each in (model, load(layout, "float32")))
    assert model.model_dtype() == torch.float32, "as it computes on a CPU"
    assert relative_l2(got, want) < READ_BY_COMFYUI[layout]


@pytest.mark.parametrize("layout", ["mxfp8", "Q8_0", "sdnq"])
def test_the_variants_settings_come_out(host, own_models, layout):
    name, write = LAYOUTS[layout]
    name = f"lens-turbo_{name}"
    write(own_models / ("lens" if layout == "sdnq" else "diffusion_models") / name)
    _, steps, cfg = host.run("LensModelLoader", model_name=name, dtype="bfloat16")
    assert (steps, cfg) == (4, 1.0)


@pytest.mark.parametrize(
    ("layout", "mode", "said"),
    [
        ("mxfp8", "int8_dynamic", "is quantised already (mxfp8), so its weights stay as they are"),
        ("Q4_K", "int4_weight_only", "is quantised already (Q4_K, Q8_0), so its weights stay as they are"),
        ("sdnq", "auto", "Quantisation: auto keeps"),
        ("scaled", "auto", "Quantisation: auto keeps"),
    ],
)
def test_another_mode_keeps_the_file_and_says_so_once(load, layout, mode, said, caplog):
    kept = load(layout).model.diffusion_model.state_dict()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        state = load(layout, quantization=mode).model.diffusion_model.state_dict()
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if said in line]) == 1
    assert state.keys() == kept.keys()
    assert all(torch.equal(bits(state[name]), bits(kept[name])) for name in state)


def test_a_mode_of_the_files_format_changes_the_inputs_alone(load, written, caplog):
    path = written("scaled")[1]
    want = {
        mode: load_denoiser(path, torch.float32, quantization=mode) for mode in ("float8_weight_only", "none")
    }
    for mode, denoiser in want.items():
        got, _ = velocities(load("scaled", "float32", mode), path, torch.float32)
        assert relative_l2(got, velocity(denoiser, torch.float32)) < 2e-6
    assert not [record for record in caplog.records if "is quantised already" in record.getMessage()]


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    "layout",
    [
        "float8_e5m2",
        "int8 turned",
        "convrot_w4a4",
        "nvfp4",
        "scaled",
        "unscaled",
        "sdnq",
        "Q4_1",
        "Q8_0",
        "Q6_K",
    ],
)
def test_a_lora_shows_and_leaves_no_trace(host, load, draw, own_models, layout):
    model = load(layout)
    plain, *_ = host.run("LensModelLoader", model_name="lens_tiny_bf16.safetensors", dtype="bfloat16")
    write_lora(own_models / "loras" / "files.safetensors", plain.model.diffusion_model, 1.0)
    before = draw(model=model)["samples"]
    apart = []
    for strength in (0.5, 1.0):
        (patched,) = host.run(
            "LoraLoaderModelOnly", model=model, lora_name="files.safetensors", strength_model=strength
        )
        apart.append(relative_l2(draw(model=patched)["samples"], before))
    assert 0.05 < apart[0] < apart[1]
    assert torch.equal(draw(model=model)["samples"], before)
