"""LensLoraLoader: each kind is what merging by hand gives, and what of a file was used is said."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lens_core.quant.policy import MODES
from tests.compare import relative_l2
from tests.host.fake_gpu import FakeGpu, use_dynamic_patchers
from tests.host.helpers import LORA_TARGETS, write_lora
from tests.host.lora_kinds import LAYERS, changed, merge, write_kind
from tests.host.test_nodes import declared, options
from tests.lora_files import KINDS, SPELLINGS

# Weights patched in fp32 and merged by hand in fp64, then the same forward. Measured: 2.4e-7 at most.
SAME = 1e-5
# A weight in fp32 and in fp64. Measured: 7e-8 at most.
SAME_WEIGHT = 1e-6


@pytest.fixture
def load_lora(host):
    """The node; returns its MODEL."""

    def run(model, name, strength=1.0, **inputs):
        return host.run("LensLoraLoader", model=model, lora_name=name, strength=strength, **inputs)[0]

    return run


@pytest.fixture
def stock_lora(host):
    return lambda model, name, strength: host.run(
        "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength
    )[0]


@pytest.fixture
def loras(own_models):
    return own_models / "loras"


@pytest.fixture
def said(host, monkeypatch) -> list[str]:
    """What the node shows on the page."""
    import server

    shown: list[str] = []
    page = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append(text))
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    node = host.node_classes["LensLoraLoader"]
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"), raising=False)
    return shown


@pytest.mark.parametrize(
    ("kind", "spelling"), [*((kind, "OneTrainer") for kind in KINDS), *(("LoRA", name) for name in SPELLINGS)]
)
def test_it_equals_merged_weights(tiny, velocity, load_lora, load_tiny, loras, kind, spelling):
    """Each kind in one spelling, and LoRA in each."""
    other, *_ = load_tiny()
    changes = write_kind(loras / "kind.safetensors", kind, other.model.diffusion_model, spelling=spelling)
    merge(other.model.diffusion_model, changes, lambda _: -0.7)
    before = velocity(tiny.model)
    patched = load_lora(tiny.model, "kind.safetensors", -0.7)
    got, want = velocity(patched), velocity(other)
    assert relative_l2(got, want) < SAME
    assert relative_l2(got, before) > 1000 * SAME, "the LoRA does nothing"
    assert torch.equal(velocity(tiny.model), before), "the LoRA stayed"


def test_biases_change_too(tiny, load_lora, loras):
    import comfy.model_management

    bias = torch.randn(384)
    layer = {f"transformer.{LAYERS[0]}.diff_b": bias}
    network = tiny.model.model.diffusion_model
    write_kind(loras / "biased.safetensors", "full weights", network, LAYERS[:1], more=layer)
    patched = load_lora(tiny.model, "biased.safetensors", 0.5)
    before = network.get_submodule(LAYERS[0]).bias.clone()
    comfy.model_management.load_models_gpu([patched])
    torch.testing.assert_close(network.get_submodule(LAYERS[0]).bias, before + 0.5 * bias)
    comfy.model_management.load_models_gpu([tiny.model])


def test_spellings_that_comfyui_knows_give_what_its_loader_gives(
    tiny, velocity, load_lora, stock_lora, loras
):
    write_lora(loras / "known.safetensors", tiny.model.model.diffusion_model, 1.0)
    ours, theirs = (
        load_lora(tiny.model, "known.safetensors", 0.6),
        stock_lora(tiny.model, "known.safetensors", 0.6),
    )
    assert len(ours.patches) == len(theirs.patches) == len(LORA_TARGETS)
    assert torch.equal(velocity(ours), velocity(theirs))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA by output"])
def test_comfyuis_own_lens_takes_it_too(tiny, velocity, load_lora, loras, stock_model, kind):
    write_kind(loras / "shared.safetensors", kind, tiny.model.model.diffusion_model)
    before = velocity(stock_model)
    ours, theirs = (
        velocity(load_lora(model, "shared.safetensors", 0.5)) for model in (tiny.model, stock_model)
    )
    assert relative_l2(ours, theirs) < SAME
    assert relative_l2(theirs, before) > 0.02


@pytest.mark.parametrize("mode", MODES)
def test_on_quantised_weights_it_is_what_comfyuis_is(host, velocity, load_lora, stock_lora, loras, mode):
    def load(quantization):
        return host.run(
            "LensModelLoader",
            model_name="lens_tiny_bf16.safetensors",
            dtype="bfloat16",
            quantization=quantization,
        )[0]

    model = load(mode)
    write_lora(loras / "small.safetensors", load("none").model.diffusion_model, 1.0)
    before = velocity(model)
    ours, theirs = (velocity(lora(model, "small.safetensors", 1.0)) for lora in (load_lora, stock_lora))
    assert torch.equal(ours, theirs) and relative_l2(ours, before) > 0.05
    assert torch.equal(velocity(model), before), "the LoRA stayed"
    # A kind that ComfyUI leaves to us, on quantised weights.
    write_kind(loras / "turned.safetensors", "OFT", model.model.diffusion_model)
    assert relative_l2(velocity(load_lora(model, "turned.safetensors")), before) > 0.05
    assert torch.equal(velocity(model), before), "the OFT stayed"


def test_a_lora_for_lens_fits_turbo(host, tiny, draw, load_lora, loras, said):
    write_kind(loras / "lens.safetensors", "LoRA", tiny.model.model.diffusion_model)
    turbo, steps, cfg = host.run(
        "LensModelLoader", model_name="lens_turbo_tiny_bf16.safetensors", dtype="float32"
    )
    patched = load_lora(turbo, "lens.safetensors")
    settings = {"steps": steps, "cfg": cfg}
    assert (
        relative_l2(draw(model=patched, **settings)["samples"], draw(model=turbo, **settings)["samples"])
        > 0.02
    )
    assert said == ["lens.safetensors: matched 4 of 4, strength 1, rank 4."]


def test_several_in_a_row_add_up(tiny, velocity, load_lora, loras):
    """And the same one twice is twice as much, to fp32 rounding of the sums."""
    network = tiny.model.model.diffusion_model
    write_kind(loras / "first.safetensors", "LoRA", network)
    write_kind(loras / "second.safetensors", "LoKr", network)
    half = load_lora(tiny.model, "first.safetensors", 0.5)
    twice = load_lora(half, "first.safetensors", 0.5)
    assert relative_l2(velocity(twice), velocity(load_lora(tiny.model, "first.safetensors"))) < SAME
    one = load_lora(load_lora(tiny.model, "first.safetensors"), "second.safetensors", 2.0)
    other = load_lora(load_lora(tiny.model, "second.safetensors", 2.0), "first.safetensors")
    assert relative_l2(velocity(one), velocity(other)) < SAME
    assert relative_l2(velocity(one), velocity(twice)) > 0.02


def test_strengths_of_blocks_and_streams(tiny, velocity, load_lora, load_tiny, loras, said):
    other, *_ = load_tiny()
    changes = write_kind(loras / "blocks.safetensors", "LoRA", other.model.diffusion_model)
    factors = dict(zip(LAYERS, (0.5, 2.0, 0.0, 0.0), strict=True))
    merge(other.model.diffusion_model, changes, lambda name: 0.8 * factors[name])
    patched = load_lora(tiny.model, "blocks.safetensors", 0.8, block_strengths="0: 0.5, 1-2: 2, txt: 0")
    assert relative_l2(velocity(patched), velocity(other)) < SAME
    assert len(patched.patches) == 2
    assert said == [
        "blocks.safetensors: matched 4 of 4, strength 0.8, rank 4. block_strengths: 2 of 4 layers are at 0."
    ]
    with pytest.raises(Exception, match="names blocks 0 to 3; this model has 0 to 2"):
        load_lora(tiny.model, "blocks.safetensors", block_strengths="0-3: 1")


def test_strength_0_reads_nothing(tiny, load_lora, said):
    assert load_lora(tiny.model, "is not there.safetensors", 0.0) is tiny.model
    assert said == ["is not there.safetensors: strength 0, the model is as it was."]


def test_what_did_not_match_is_named(tiny, load_lora, loras, said, caplog):
    path = loras / "partly.safetensors"
    write_kind(path, "LoRA", tiny.model.model.diffusion_model, LAYERS[:1])
    more = {"transformer_blocks.9.attn.img_qkv.lora_A.weight": torch.zeros(4, 128), "what": torch.zeros(1)}
    text = {"lora_te1_layers_0_q_proj.lora_down.weight": torch.zeros(4, 128)}
    save_file({**load_file(path), **more, **text}, path)
    load_lora(tiny.model, path.name)
    (shown,) = said
    assert shown.startswith("partly.safetensors: matched 1 of 3, strength 1, rank 4, not matched (3 keys): ")
    for key in (*more, *text):
        assert key in shown
    assert shown.endswith("Keys for a text encoder, which are not used: 1.")
    assert [r.levelname for r in caplog.records if shown in r.getMessage()] == ["WARNING"]


def test_what_comfyui_does_not_take_is_named(host, tiny, load_lora, loras, said, monkeypatch):
    """A tensor that no adapter reads, and one for a weight that the MODEL has not."""
    write_kind(loras / "odd.safetensors", "full weights", tiny.model.model.diffusion_model, LAYERS[:1])
    node = host.module("nodes.host.lora")
    match = node.Matched

    def with_more(*args):
        layers, *rest = args
        no_bias = {"transformer_blocks.1.img_mlp.w1": {"diff_b": torch.zeros(1), "strange": torch.zeros(1)}}
        return match({**layers, **no_bias}, *rest)

    monkeypatch.setattr(host.module("lens_core.lora.file"), "Matched", with_more)
    load_lora(tiny.model, "odd.safetensors")
    layer = "transformer_blocks.1.img_mlp.w1"
    assert said[0].endswith(f"Not applied by ComfyUI: {layer}.strange, {layer}.bias.")


def test_errors_are_one_sentence(host, tiny, load_lora, loras):
    import comfy.model_base

    flux = SimpleNamespace(model=object.__new__(comfy.model_base.Flux))
    with pytest.raises(Exception, match="The model is Flux; this node patches Lens only"):
        load_lora(flux, "any.safetensors")
    with pytest.raises(Exception, match=r"There is no LoRA 'gone\.safetensors' in models/loras"):
        load_lora(tiny.model, "gone.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 8)}, loras / "flux.safetensors")
    with pytest.raises(Exception, match=r"flux\.safetensors is a LoRA for FLUX .*expected one for Lens"):
        load_lora(tiny.model, "flux.safetensors")
    save_file({"img_in.weight": torch.zeros(4, 8)}, loras / "model.safetensors")
    with pytest.raises(Exception, match=r"model\.safetensors is .*no LoRA"):
        load_lora(tiny.model, "model.safetensors")


def test_a_file_replaced_under_its_name_is_read_again_and_may_change_while_used(
    host, tiny, velocity, load_lora, loras
):
    """A trainer writes its file anew, also in place: what was loaded must not read it from the disk."""
    node, path = host.node_classes["LensLoraLoader"], loras / "training.safetensors"
    inputs = {"lora_name": path.name, "strength": 1.0, "block_strengths": ""}
    assert node.fingerprint_inputs(**inputs) == "" and node.fingerprint_inputs(lora_name=None) == ""
    write_kind(path, "LoRA", tiny.model.model.diffusion_model)
    first = node.fingerprint_inputs(**inputs)
    patched = load_lora(tiny.model, path.name)
    want = velocity(patched)
    velocity(tiny.model)
    with path.open("r+b") as file:
        file.truncate(64)
    assert torch.equal(velocity(patched), want)
    write_kind(path, "LoRA", tiny.model.model.diffusion_model, LAYERS[:2])
    second = node.fingerprint_inputs(**inputs)
    assert first != second == node.fingerprint_inputs(**inputs)
    assert str(loras) not in first, "ComfyUI writes it into pictures"
    (loras / "adapter_config.json").write_text("{}")
    assert node.fingerprint_inputs(**inputs) != second, "PEFT's alpha is in there"
    os.unlink(loras / "adapter_config.json")


def test_the_list_has_safetensors_files(host, loras):
    for name in ("a.safetensors", "old.pt", "B.SFT"):
        (loras / name).write_bytes(b"")
    listed = options(declared(host.node_classes["LensLoraLoader"])["lora_name"])
    assert {"a.safetensors", "B.SFT"} <= set(listed) and "old.pt" not in listed


@pytest.mark.parametrize("kind", ["LoRA", "DoRA by output"])
def test_under_dynamic_vram_each_weight_is_patched_as_it_is_used(host, loras, load_lora, monkeypatch, kind):
    import comfy.model_management as management

    FakeGpu(1 << 40).install(monkeypatch)
    use_dynamic_patchers(monkeypatch)
    (model, *_) = host.run("LensModelLoader", model_name="Lens-tiny", dtype="float32")
    network = model.model.diffusion_model
    changes = write_kind(loras / "dynamic.safetensors", kind, network)
    patched = load_lora(model, "dynamic.safetensors", 0.5)
    assert patched.is_dynamic()
    management.load_models_gpu([patched])
    for name, change in changes.items():
        module = network.get_submodule(name)
        function = module.weight_lowvram_function
        assert function.memory_required() > 0
        want = changed(module.weight, change, 0.5)
        assert relative_l2(function(module.weight.detach().clone()), want) < SAME_WEIGHT
        # As ComfyUI brings its tensors to the GPU.
        function.prepare(torch.empty(function.memory_required(), dtype=torch.uint8), None)
        assert relative_l2(function(module.weight.detach().clone()), want) < SAME_WEIGHT
        function.clear_prepared()
    management.load_models_gpu([model])
    assert network.get_submodule(LAYERS[0]).weight_lowvram_function is None
    management.unload_all_models()
