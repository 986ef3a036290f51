"""LensSaveModel: the file draws what the MODEL drew with its patches, in both loaders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lens_core.quant.policy import MODES
from tests.compare import relative_l2
from tests.core.quantize_cases import raw
from tests.host.fake_gpu import GPU, FakeGpu, use_dynamic_patchers
from tests.host.lora_kinds import LAYERS, write_kind
from tests.host.test_nodes import declared, options
from tests.live_bytes import LiveBytes

SINGLE, TURBO = "lens_tiny_bf16.safetensors", "lens_turbo_tiny_bf16.safetensors"
OURS_ALONE = ("int4_weight_only", "uint4_sdnq")
# The same arithmetic on the same weights, which lie elsewhere and which ComfyUI's own Lens orders otherwise:
# measured 2e-7 and 3e-7.
SAME = 1e-6


@pytest.fixture
def load(host) -> Callable[..., Any]:
    """A MODEL from LensModelLoader."""

    def run(name: str = SINGLE, dtype: str = "bfloat16", mode: str = "none") -> Any:
        return host.run("LensModelLoader", model_name=name, dtype=dtype, quantization=mode)[0]

    return run


@pytest.fixture
def patch(host, own_models: Path, tiny) -> Callable[..., Any]:
    """The MODEL with a LoRA of ours and another of ComfyUI's loader."""

    def run(model: Any) -> Any:
        loras, network = own_models / "loras", tiny.model.model.diffusion_model
        write_kind(loras / "one.safetensors", "DoRA by output", network, LAYERS[:2])
        write_kind(loras / "two.safetensors", "LoRA", network, LAYERS[1:], "ComfyUI")
        (first,) = host.run("LensLoraLoader", model=model, lora_name="one.safetensors", strength=0.5)
        inputs = {"lora_name": "two.safetensors", "strength_model": 1.5}
        return host.run("LoraLoaderModelOnly", model=first, **inputs)[0]

    return run


@pytest.fixture
def save(host, models: Path) -> Callable[..., str]:
    """Runs the node; returns its output."""
    return lambda model, name="saved", **inputs: host.run(
        "LensSaveModel", model=model, file_name=name, **inputs
    )[0]


def tensors(model: Any) -> dict[str, tuple]:
    return {name: raw(value) for name, value in model.model.diffusion_model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drawn_before", [False, True])
def test_the_file_is_what_the_patched_model_drew_with(load, patch, save, velocity, dtype, drawn_before):
    """To the bit, whether its weights were patched at that moment or not."""
    model = load("Lens-tiny", dtype)
    patched = patch(model)
    want = velocity(patched)
    merged = tensors(patched)
    if not drawn_before:
        assert relative_l2(velocity(model), want) > 0.02
    saved = load(save(patched), dtype)
    assert not saved.patches and tensors(saved) == merged
    assert relative_l2(velocity(saved), want) < SAME
    assert torch.equal(velocity(patched), want), "saving changed the MODEL"


def test_comfyuis_own_loader_draws_with_the_file(host, load, patch, save, velocity):
    from tests.host.helpers import align_qk_eps

    patched = patch(load("Lens-tiny", "float32"))
    (stock,) = host.run("UNETLoader", unet_name=save(patched), weight_dtype="default")
    align_qk_eps(stock.model.diffusion_model)
    assert relative_l2(velocity(stock), velocity(patched)) < SAME


def test_comfyuis_own_lens_is_saved_too(host, load, patch, save, velocity, models):
    """Turbo by the name of the file that it is from, and in the bits that ComfyUI itself saves."""
    (stock,) = host.run("UNETLoader", unet_name=TURBO, weight_dtype="default")
    patched = patch(stock)
    path = models / save(patched)
    with safe_open(path, "pt") as file:
        assert file.metadata()["lens.variant"] == "Lens-Turbo"
    want = {
        name: value.to("cpu")
        for name, value in patched.model_state_dict_for_saving(
            patched.model.diffusion_model, "diffusion_model."
        ).items()
    }
    got = load_file(path)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name].to(got[name].dtype))] == []


@pytest.mark.parametrize("mode", MODES)
def test_quantised_weights_stay_quantised(host, load, patch, save, velocity, models, mode):
    patched = patch(load(dtype="float32", mode=mode))
    velocity(patched)
    merged = tensors(patched)
    name = save(patched)
    saved = load(name, "float32")
    got = tensors(saved)
    assert got.keys() == merged.keys() and [key for key in merged if got[key] != merged[key]] == []
    if mode not in OURS_ALONE:
        (stock,) = host.run("UNETLoader", unet_name=name, weight_dtype="default")
        for layer in LAYERS[:3]:
            theirs, ours = (m.model.diffusion_model.get_submodule(layer).weight for m in (stock, saved))
            assert relative_l2(theirs.dequantize(), ours.dequantize()) < SAME


def test_turbo_stays_turbo_and_the_file_says_what_is_in_it(host, load, patch, save, models):
    name = save(patch(load(TURBO)), "sub/mine")
    assert name == str(Path("sub", "mine.safetensors"))
    with safe_open(models / name, "pt") as file:
        metadata = file.metadata()
    assert metadata["lens.variant"] == "Lens-Turbo"
    (told,) = json.loads(metadata["lens.loras"])
    assert (told["file"], told["strength"]) == ("one.safetensors", 0.5) and told["identity"]
    _, *settings = host.run("LensModelLoader", model_name=name, dtype="bfloat16")
    assert settings == [4, 1.0]
    assert name in options(declared(host.node_classes["LensModelLoader"])["model_name"])


def test_tensors_lie_at_multiples_of_their_numbers_size(load, save, models):
    """Where they do not, reading copies them."""
    path = models / save(load(mode="float8_dynamic"))
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    odd = [
        n for n, entry in header.items() if (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]]
    ]
    assert odd == []


def test_names_that_cannot_be_are_refused(load, save, models):
    model = load()
    path = models / save(model, "x")
    content = path.read_bytes()
    with pytest.raises(Exception, match=r"exists already\. Give another name, or switch overwrite on"):
        save(model, "x.safetensors")
    for name, message in (("../x", "is none below"), (" ", "file_name is empty")):
        with pytest.raises(Exception, match=message):
            save(model, name)
    own = load("x.safetensors")
    with pytest.raises(Exception, match="would replace the file that the model is from"):
        save(own, "x", overwrite=True)
    assert path.read_bytes() == content
    save(load(TURBO), "x", overwrite=True)
    assert path.read_bytes() != content and [file.name for file in models.iterdir()] == ["x.safetensors"]
    other = SimpleNamespace(model=object())
    with pytest.raises(Exception, match="The model is object; this node saves Lens only"):
        save(other)


def test_cancel_leaves_nothing(load, patch, save, models, progress):
    """A part could be gone on with only by the same patches, which its header does not tell."""
    import comfy.model_management as management
    import comfy.utils

    hook = comfy.utils.PROGRESS_BAR_HOOK

    def press(done: int, total: int, *rest: Any, **named: Any) -> None:
        hook(done, total, *rest, **named)
        if done == 20:
            management.interrupt_current_processing(True)

    patched = patch(load())
    progress.clear()
    comfy.utils.set_progress_bar_global_hook(press)
    try:
        with pytest.raises(management.InterruptProcessingException):
            save(patched)
    finally:
        management.interrupt_current_processing(False)
        comfy.utils.set_progress_bar_global_hook(hook)
    done, totals, _ = zip(*progress, strict=True)
    assert list(done) == list(range(1, 21)) and set(totals) == {94}
    assert list(models.iterdir()) == []


def test_a_part_of_other_work_is_begun_anew(load, save, models):
    """Two MODELs with the same header: of the first only a part was written."""
    path = models / save(load(TURBO), "x")
    whole = path.read_bytes()
    part = path.rename(models / "x.safetensors.part")
    part.write_bytes(whole[: len(whole) // 2])
    save(load(TURBO), "x")
    assert path.read_bytes() == whole and not part.exists()


def test_a_deleted_file_is_written_again_and_a_full_disk_is_said(host, load, save, models, monkeypatch):
    import shutil

    node = host.node_classes["LensSaveModel"]
    missing = node.fingerprint_inputs(file_name="x")
    path = models / save(load(), "x")
    assert node.fingerprint_inputs(file_name="x") != missing
    path.unlink()
    assert node.fingerprint_inputs(file_name="x") == missing
    assert node.fingerprint_inputs(file_name=None) == node.fingerprint_inputs(file_name="../y") != missing
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Exception, match=r"x\.safetensors needs .* MB and 0\.0 MB are free"):
        save(load(), "x")


def test_what_it_says(host, load, patch, save, monkeypatch):
    import comfy.sd
    import server

    shown: list[str] = []
    page = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append(text))
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    monkeypatch.setattr(
        host.node_classes["LensSaveModel"], "hidden", SimpleNamespace(unique_id="7"), raising=False
    )
    patched = patch(load())
    save(patched)
    assert shown == ["saved.safetensors, 4 MB, 4 weights merged. Press R to have it in the loaders' lists."]
    lora = {f"diffusion_model.{LAYERS[0]}.lora_A.weight": torch.zeros(4, 128)}
    lora |= {f"diffusion_model.{LAYERS[0]}.lora_B.weight": torch.zeros(384, 4)}
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(load(), None, lora, 1.0, 0.0)
    save(bypassed, "other")
    assert shown[1].endswith("A LoRA in bypass mode is no part of the weights, and not in it.")


def test_weights_are_merged_one_at_a_time(load, patch, save):
    """No second model in memory: beside the MODEL there is no more than what one weight takes."""
    patched = patch(load("Lens-tiny", "float32"))
    network = patched.model.diffusion_model
    largest = max(weight.nbytes for weight in network.parameters())
    with LiveBytes() as memory:
        save(patched)
    assert 0 < memory.peak < 6 * largest < sum(weight.nbytes for weight in network.parameters()) / 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_from_a_gpu(load, patch, save, velocity, monkeypatch, dynamic):
    """Loaded there with its patches, with and without dynamic VRAM."""
    import comfy.model_management as management

    want = velocity(patch(load("Lens-tiny", "float32")))
    with monkeypatch.context() as during:
        FakeGpu(1 << 40).install(during)
        if dynamic:
            use_dynamic_patchers(during)
        patched = patch(load("Lens-tiny", "float32"))
        assert patched.is_dynamic() == dynamic and patched.load_device == GPU
        management.load_models_gpu([patched])
        name = save(patched)
        management.unload_all_models()
    assert relative_l2(velocity(load(name, "float32")), want) < SAME
