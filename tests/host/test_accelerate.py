"""LensAccelerate: what it puts on a MODEL, where that stays, and which runs go without it.

Graphs are recorded by a stand-in (see ``fake_graphs``) on the CPU, which the node takes for an NVIDIA GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.compare import relative_l2
from tests.host import fake_graphs
from tests.host.fake_gpu import GPU, FakeGpu, use_dynamic_patchers
from tests.host.helpers import random_context, write_lora

GRAPHS, ATTENTION = "lens_graphs", "lens_attention"
OFF = {"cuda_graphs": False, "attention": "auto"}


@pytest.fixture
def accelerate(host):
    """The node."""

    def run(model, cuda_graphs=True, attention="auto"):
        inputs = {"cuda_graphs": cuda_graphs, "attention": attention}
        return host.run("LensAccelerate", model=model, **inputs)[0]

    return run


@pytest.fixture
def recording(host, monkeypatch):
    """This machine records graphs, and ComfyUI was started with PyTorch's attention, as on NVIDIA GPUs."""
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    fake_graphs.install(host.module("lens_core.denoiser.graph"), monkeypatch)
    monkeypatch.setattr(host.module("nodes.host.accelerate"), "why_never", lambda model: None)


@pytest.fixture
def unload():
    import comfy.model_management

    return comfy.model_management.unload_all_models


def options(model) -> dict:
    return model.model_options["transformer_options"]


def runs(model) -> tuple[int, int, int]:
    """Forwards played, recorded, launched by a MODEL with graphs, of all runs so far."""
    return tuple(options(model)[GRAPHS].runs.values())


@pytest.fixture(params=["LensLoraLoader", "LoraLoaderModelOnly"])
def lora(request, host, tiny, own_models):
    def run(model, name="accelerated.safetensors"):
        write_lora(own_models / "loras" / name, tiny.model.model.diffusion_model, 1.0)
        strength = "strength" if request.param == "LensLoraLoader" else "strength_model"
        return host.run(request.param, model=model, lora_name=name, **{strength: 1.0})[0]

    return run


def test_settings_go_on_a_clone_and_stay_on_its_clones(tiny, accelerate, recording):
    before = dict(options(tiny.model))
    model = accelerate(tiny.model, attention="host")
    assert options(tiny.model) == before and model is not tiny.model
    assert options(model)[ATTENTION] == "host"
    clone = model.clone().clone()
    assert options(clone)[GRAPHS] is options(model)[GRAPHS]
    assert options(clone)[ATTENTION] == "host"
    assert clone.model is model.model is tiny.model.model


def test_the_last_node_counts(tiny, accelerate, recording):
    first = accelerate(tiny.model, attention="host")
    again = accelerate(first)
    assert options(again)[GRAPHS] is not options(first)[GRAPHS] and ATTENTION not in options(again)
    assert options(accelerate(first, **OFF)) == options(tiny.model)
    assert GRAPHS in options(first) and ATTENTION in options(first)


def test_all_off_draws_the_same(tiny, draw, accelerate):
    assert torch.equal(draw(model=accelerate(tiny.model, **OFF))["samples"], draw()["samples"])


@pytest.mark.parametrize("cfg, count", [(5.0, 40), (1.0, 20)])
def test_steps_are_recorded_once_and_played(tiny, draw, accelerate, recording, caplog, cfg, count):
    """Prompt and negative have graphs of their own; another run of the same size records nothing."""
    model = accelerate(tiny.model)
    want = draw(steps=20, cfg=cfg)["samples"]
    caplog.set_level("INFO")
    once = count // 20
    assert torch.equal(draw(model=model, steps=20, cfg=cfg)["samples"], want)
    assert f"Lens: CUDA graphs: {count - once} of {count} forwards played, {once} recorded." in caplog.text
    assert torch.equal(draw(model=model, steps=20, cfg=cfg)["samples"], want)
    assert f"Lens: CUDA graphs: {count} of {count} forwards played, 0 recorded." in caplog.text
    assert runs(model) == (2 * count - once, once, once)


def test_nothing_is_logged_without_the_node(draw, caplog):
    caplog.set_level("INFO")
    draw()
    assert "CUDA graphs" not in caplog.text


def test_lora_after_it(tiny, draw, accelerate, recording, lora):
    """Neither MODEL plays the other's graphs, in whatever order they draw."""
    plain, patched = draw(steps=3)["samples"], draw(model=lora(tiny.model), steps=3)["samples"]
    assert relative_l2(plain, patched) > 0.1
    fast = accelerate(tiny.model)
    fast_with_lora = lora(fast)
    for model, want in ((fast, plain), (fast_with_lora, patched), (fast, plain), (fast_with_lora, patched)):
        played = runs(model)[0]
        assert torch.equal(draw(model=model, steps=3)["samples"], want)
        assert runs(model)[0] >= played + 4


def test_weights_changed_in_place(tiny, load_tiny, draw, accelerate, recording):
    """As LoRA are where ComfyUI saves memory; a graph reads what lies there now."""
    model = accelerate(load_tiny()[0])
    before = draw(model=model)["samples"]
    weight = model.model.diffusion_model.blocks[1].img_mlp.w2.weight
    weight.data.mul_(1.5)
    got, recorded = draw(model=model)["samples"], runs(model)[1]
    assert relative_l2(got, before) > 1e-3
    del options(model)[GRAPHS]
    assert torch.equal(got, draw(model=model)["samples"])
    assert recorded == 2, "the same graphs were played"


def with_injection(model, conds):
    """As a LoRA in bypass mode does: a layer's forward is replaced while the model is loaded."""
    from comfy.patcher_extension import PatcherInjection

    layer = model.model.diffusion_model.blocks[0].attn.to_out[0]
    own = layer.forward

    def inject(_):
        layer.forward = lambda x: 1.5 * own(x)

    def eject(_):
        layer.forward = own

    clone = model.clone()
    clone.set_injections("test", [PatcherInjection(inject=inject, eject=eject)])
    return clone, conds


def with_weight_wrapper(model, conds):
    clone = model.clone()
    clone.add_weight_wrapper(
        "diffusion_model.transformer_blocks.0.img_mlp.w2.weight", lambda weight: 2 * weight
    )
    return clone, conds


def with_replaced_layer(model, conds):
    name = "diffusion_model.transformer_blocks.0.img_mlp.w1"
    own, clone = model.get_model_object(name), model.clone()
    clone.add_object_patch(name, torch.nn.Sequential(own, torch.nn.Tanh()))
    return clone, conds


def with_hook(model, conds):
    import comfy.hooks

    clone = model.clone()
    name = "diffusion_model.transformer_blocks.0.img_mlp.w2.weight"
    doubled = {name: 2 * model.model.state_dict()[name]}
    group = comfy.hooks.create_hook_model_as_lora(doubled, None, strength_model=1.0, strength_clip=0.0)
    return clone, comfy.hooks.set_hooks_for_conditioning(conds, group)


def with_compiled_mark(model, conds):
    clone = model.clone()
    clone.model_options["torch_compile_kwargs"] = {}
    return clone, conds


@pytest.mark.parametrize(
    "change, reason",
    [
        (with_injection, "a node changes how its layers compute"),
        (with_weight_wrapper, "a node computes its weights anew"),
        (with_replaced_layer, "a node has replaced some of its layers"),
        (with_hook, "hooks change its weights"),
        (with_compiled_mark, "it is compiled"),
    ],
)
def test_runs_without_graphs(tiny, draw, accelerate, recording, unload, caplog, change, reason):
    """Graphs of the MODEL before it are there, and would be played: the weights lie where they lay."""
    plain = draw()["samples"]
    fast = accelerate(tiny.model)
    assert torch.equal(draw(model=fast)["samples"], plain)
    seen = runs(fast)
    model, positive = change(fast, tiny.positive)
    got = draw(model=model, positive=positive)["samples"]
    assert f"Lens: this run is without CUDA graphs: {reason}" in caplog.text
    assert runs(fast) == seen, "graphs were looked at"
    assert GRAPHS in options(model), "only the run's options are without"
    unload()  # an injection is taken back only then
    model, positive = change(tiny.model, tiny.positive)
    assert torch.equal(got, draw(model=model, positive=positive)["samples"])
    if change is not with_compiled_mark:
        assert relative_l2(got, plain) > 1e-4, "the change does nothing"
    unload()
    assert torch.equal(draw(model=fast)["samples"], plain)


def test_several_gpus_share_no_graphs(host):
    why_not_now = host.module("nodes.host.graphs").why_not_now
    patcher = SimpleNamespace(injections={}, weight_wrapper_patches={}, object_patches={"model_sampling": 1})
    others: dict = {"multigpu": []}
    patcher.get_additional_models_with_key = lambda key: others[key]
    assert why_not_now(patcher, {}) is None
    others["multigpu"].append(object())
    assert why_not_now(patcher, {}) == "it is spread over several GPUs"


def test_nodes_between_the_blocks_see_them(tiny, draw, accelerate, recording):
    """A patch of blocks runs block by block, so nothing is recorded."""
    fast = accelerate(tiny.model)
    draw(model=fast)
    seen = runs(fast)

    def patched(model):
        clone = model.clone()
        clone.set_model_double_block_patch(lambda args: {"img": 1.1 * args["img"], "txt": args["txt"]})
        return draw(model=clone)["samples"]

    assert torch.equal(patched(fast), patched(tiny.model))
    assert runs(fast) == seen


def test_padded_prompts_run_beside_graphs(tiny, draw, accelerate, recording):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:] = 0
    both = {"samples": torch.zeros(2, 128, 6, 4)}
    inputs = {"positive": [[random_context(2, 9), {"attention_mask": mask}]], "latent": both, "cfg": 5.0}
    fast = accelerate(tiny.model)
    assert torch.equal(draw(model=fast, steps=4, **inputs)["samples"], draw(steps=4, **inputs)["samples"])
    played, recorded, launched = runs(fast)
    assert (played, recorded, launched) == (3, 1, 5), "the negative's alone are recorded"


def test_unloading_gives_the_memory_back(tiny, draw, accelerate, recording, unload):
    """Not what ComfyUI does before every run, though it calls that a detachment too."""
    want = draw()["samples"]
    model = accelerate(tiny.model)
    graphs = options(model)[GRAPHS]
    for _ in range(2):
        draw(model=model.clone())
        assert graphs._recorded and graphs._pool is not None
    assert runs(model)[1] == 2
    unload()
    assert not graphs._recorded and graphs._pool is None
    assert torch.equal(draw(model=model)["samples"], want)


def test_no_graph_outlives_its_models(tiny, load_tiny, draw, accelerate, recording, unload):
    import gc
    import weakref

    unload()
    model = accelerate(load_tiny()[0])
    draw(model=model)
    ends = [weakref.ref(options(model)[GRAPHS]), weakref.ref(model.model)]
    gc.disable()
    try:
        del model
        assert [end() for end in ends] == [None, None]
    finally:
        gc.enable()


def test_dynamic_vram_is_left(host, tiny, draw, accelerate, recording, unload, monkeypatch):
    """By a model of its own, with the same weights; without graphs it is kept."""
    want = draw(steps=3)["samples"]
    unload()
    FakeGpu(1 << 40).install(monkeypatch)
    use_dynamic_patchers(monkeypatch)
    (model, *_) = host.run("LensModelLoader", model_name="Lens-tiny", dtype="float32")
    kept = accelerate(model, **OFF)
    assert kept.is_dynamic() and kept.model is model.model
    fast = accelerate(model)
    assert type(fast).__name__ == "LensPatcher" and fast.model is not model.model
    assert fast.load_device == GPU
    own, new = model.model.state_dict(), fast.model.state_dict()
    assert own.keys() == new.keys() and all(torch.equal(own[name], new[name]) for name in own)
    assert torch.equal(draw(model=fast, steps=3)["samples"], want)
    assert runs(fast) == (4, 2, 2)
    unload()


def test_a_machine_without_cuda_runs_as_without_the_node(tiny, draw, accelerate, caplog):
    model = accelerate(tiny.model)
    assert "LensAccelerate: no CUDA graphs: they are for NVIDIA GPUs." in caplog.text
    assert options(model) == options(tiny.model)
    assert torch.equal(draw(model=model)["samples"], draw()["samples"])


@pytest.fixture
def card(host, tiny, monkeypatch):
    """Asks why a MODEL on a CUDA GPU with ``total`` bytes can have no graphs."""
    import comfy.model_management as management
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)

    def run(total, **chosen):
        monkeypatch.setattr(management, "get_total_memory", lambda _: total)
        model = SimpleNamespace(
            load_device=torch.device("cuda", 0),
            model=tiny.model.model,
            model_size=tiny.model.model_size,
            model_options={"transformer_options": chosen},
        )
        return host.module("nodes.host.graphs").why_never(model)

    return run


def test_graphs_need_the_whole_model_but_its_modulation(card, tiny, monkeypatch):
    import comfy.model_management as management

    from lens_core.denoiser.modulation import modulation_bytes

    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 1 << 30)
    needed = (1 << 30) + tiny.model.model_size() - modulation_bytes(tiny.model.model.diffusion_model)
    assert card(needed) is None
    assert card(needed - 1) == "1.1 GB must stay on the GPU for them, and it has 1.1"


def test_graphs_are_for_nvidia(card, monkeypatch):
    assert card(1 << 40) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert card(1 << 40) == "they are for NVIDIA GPUs"


def test_graphs_are_for_pytorchs_own_allocator(card, monkeypatch):
    assert card(1 << 40) is None
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert "start it with --disable-cuda-malloc" in card(1 << 40)


def test_graphs_take_lens_own_attention_alone(card, monkeypatch):
    from comfy.ldm.modules import attention

    other = "they take Lens' own attention alone, and another was chosen"
    assert card(1 << 40, lens_attention="host") == card(1 << 40, lens_attention="flash_attn3") == other
    assert card(1 << 40, optimized_attention_override=print) == other
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_split)
    assert card(1 << 40) == other


@pytest.mark.parametrize(
    "kind, got",
    [("stock", "another loader's Lens"), ("clip", "another loader's LensClipModel"), ("none", "no")],
)
def test_other_models_are_refused(request, tiny, accelerate, kind, got):
    models = {"stock": lambda: request.getfixturevalue("stock_model"), "clip": lambda: tiny.clip.patcher}
    model = models.get(kind, lambda: None)()
    with pytest.raises(Exception, match=f"only on models from LensModelLoader, and got {got}") as caught:
        accelerate(model)
    assert type(caught.value).__name__ == "SettingError"


def test_unknown_attention_through_a_link(tiny, accelerate):
    with pytest.raises(Exception, match="attention is 'xformers'; expected one of auto, host, flash_attn3"):
        accelerate(tiny.model, attention="xformers")
