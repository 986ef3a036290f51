"""LensQuantizeModel: what it writes loads here and in ComfyUI's own loader; cancelled, it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lens_core.quant.policy import MODES
from tests.compare import relative_l2
from tests.core.quantize_cases import TENSORS, raw
from tests.host.test_nodes import choices
from tests.host.test_quantization import APART

FOLDER, SINGLE = "Lens-Turbo-tiny", "lens_tiny_bf16.safetensors"
OURS_ALONE = ("int4_weight_only", "uint4_sdnq")


@pytest.fixture
def quantize(host, models: Path) -> Callable[..., str]:
    """Runs the node; returns its output."""

    def run(model: str = FOLDER, mode: str = "int8_dynamic", name: str = "", **inputs: Any) -> str:
        (written,) = host.run(
            "LensQuantizeModel", model_name=model, quantization=mode, file_name=name, **inputs
        )
        return written

    return run


@pytest.fixture
def said(host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node shows on the page."""
    import server

    shown: list[str] = []
    page = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append(text))
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    node = host.node_classes["LensQuantizeModel"]
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"), raising=False)
    return shown


def tensors(model: Any) -> dict[str, tuple]:
    """Every tensor of a MODEL's denoiser, packed ones in their parts."""
    return {name: raw(value) for name, value in model.model.diffusion_model.state_dict().items()}


@pytest.mark.parametrize("mode", MODES)
def test_the_loader_makes_of_the_file_what_it_makes_while_loading(host, quantize, mode):
    def load(name: str, quantization: str) -> list[Any]:
        return host.run("LensModelLoader", model_name=name, dtype="bfloat16", quantization=quantization)

    name = quantize(mode=mode)
    assert name == f"{FOLDER}_{mode}.safetensors"
    assert name in choices(host, "LensModelLoader")
    model, *settings = load(name, "none")
    expected, *published = load(FOLDER, mode)
    got, want = tensors(model), tensors(expected)
    assert got.keys() == want.keys() and [key for key in want if got[key] != want[key]] == []
    assert any(key.endswith(".comfy_quant") for key in got)
    assert settings == published == [4, 1.0], "Turbo"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in OURS_ALONE])
def test_comfyuis_own_loader_draws_with_the_file(host, quantize, models, tiny, draw, mode):
    """Recognised as its own Lens, in mixed precision, with the weights that the file stands for."""
    import comfy.model_base
    import comfy.sd
    from comfy.quant_ops import QuantizedTensor

    path = models / quantize(SINGLE, mode)
    stock = comfy.sd.load_diffusion_model(str(path))
    assert type(stock.model) is comfy.model_base.Lens
    network = stock.model.diffusion_model
    ours, *_ = host.run("LensModelLoader", model_name=path.name, dtype="bfloat16", quantization="none")
    layers = [name for name, layer in network.named_modules() if getattr(layer, "quant_format", None)]
    with safe_open(path, "pt") as file:
        stored = {
            name.removesuffix(".comfy_quant") for name in list(file.keys()) if name.endswith(".comfy_quant")
        }
        conf = {name: json.loads(bytes(file.get_tensor(f"{name}.comfy_quant").tolist())) for name in stored}
    assert set(layers) == stored and len(stored) >= 12
    for name in layers:
        theirs = network.get_submodule(name)
        assert isinstance(theirs.weight, QuantizedTensor)
        assert theirs.quant_format == conf[name]["format"]
        assert theirs._full_precision_mm_config == mode.endswith("_weight_only")
        mine = ours.model.diffusion_model.get_submodule(name)
        assert relative_l2(theirs.weight.dequantize(), mine.weight.dequantize()) < 1e-6
    with safe_open(path, "pt") as file:
        for key, value in network.state_dict().items():
            assert not key.endswith(".bias") or torch.equal(value, file.get_tensor(key).to(value.dtype)), key
    plain, *_ = host.run("LensModelLoader", model_name=SINGLE, dtype="bfloat16")
    # Not a blank negative: comfy-kitchen's int8 product on a CPU takes no empty text.
    got, want = (draw(model=model, negative=tiny.positive)["samples"] for model in (stock, plain))
    assert 1e-4 < relative_l2(got, want) < APART[mode.split("_")[0]]


@pytest.mark.parametrize("mode", OURS_ALONE)
def test_comfyuis_own_loader_refuses_this_packs_format(host, quantize, models, said, mode):
    import comfy.sd

    name = quantize(SINGLE, mode)
    with pytest.raises(KeyError, match="lens_affine"):
        comfy.sd.load_diffusion_model(str(models / name))
    assert "ComfyUI's own loader does not" in said[0]


def test_it_says_what_it_wrote_and_how_to_see_it(quantize, models, said):
    name = quantize(SINGLE, "float8_dynamic", "small/mine")
    assert name == str(Path("small", "mine.safetensors"))
    assert said == [f"{name}, 3 MB. Press R to have it in the loaders' lists."]
    assert (models / name).is_file()


def test_names_follow_model_and_mode(quantize, models):
    assert quantize(SINGLE, "nvfp4") == "lens_tiny_bf16_nvfp4.safetensors"
    assert quantize(SINGLE, "nvfp4", "  ") == "lens_tiny_bf16_nvfp4.safetensors"
    assert quantize(SINGLE, "nvfp4", "x.safetensors") == "x.safetensors"
    assert quantize(FOLDER, "nvfp4", "v1.5") == "v1.5.safetensors"
    assert len(list(models.iterdir())) == 3


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "..", "/tmp/x", "../diffusion_models_2/x", "a\nb", "\0", "{models}/../x"]
)
def test_names_that_leave_the_folder_are_refused(quantize, models, name):
    before = sorted(models.parent.rglob("*"))
    with pytest.raises(Exception, match="is none below") as caught:
        quantize(SINGLE, "nvfp4", name.format(models=models))
    assert type(caught.value).__name__ == "SettingError"
    assert sorted(models.parent.rglob("*")) == before


def test_a_name_that_another_folder_has_is_refused(quantize, models):
    """Loaders would take the other file: models/unet is searched first."""
    (models.parent / "unet" / "x.safetensors").write_bytes(b"mine")
    with pytest.raises(Exception, match=r"x\.safetensors is in .*unet.* already"):
        quantize(SINGLE, "nvfp4", "x", overwrite=True)


def test_existing_files_and_quantised_models_are_refused(quantize, models):
    (models / "x.safetensors").write_bytes(b"mine")
    with pytest.raises(Exception, match=r"exists already.* overwritten\."):
        quantize(SINGLE, "nvfp4", "x")
    assert (models / "x.safetensors").read_bytes() == b"mine"
    name = quantize(SINGLE, "nvfp4", "x", overwrite=True)
    with pytest.raises(Exception, match=r"x\.safetensors is quantised already \(nvfp4\)"):
        quantize(name, "mxfp8")
    assert quantize(SINGLE, "nvfp4", "x") == name, "just this file"
    with pytest.raises(Exception, match="expected one of float8_weight_only"):
        quantize(SINGLE, "auto", "y")


def test_progress_cancel_and_going_on(quantize, models, progress):
    import comfy.model_management as management
    import comfy.utils

    hook = comfy.utils.PROGRESS_BAR_HOOK

    def press(done: int, total: int, *rest: Any, **named: Any) -> None:
        hook(done, total, *rest, **named)
        if done == 40:
            management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(press)
    try:
        with pytest.raises(management.InterruptProcessingException):
            quantize(name="x")
    finally:
        management.interrupt_current_processing(False)
        comfy.utils.set_progress_bar_global_hook(hook)
    assert [(done, total) for done, total, _ in progress] == [(done, TENSORS) for done in range(1, 41)]
    assert [path.name for path in models.iterdir()] == ["x.safetensors.part"]
    progress.clear()
    quantize(name="x")
    done = [done for done, _, _ in progress]
    assert 30 < done[0] <= 41 and done == list(range(done[0], TENSORS + 1))
    quantize(name="whole")
    assert (models / "x.safetensors").read_bytes() == (models / "whole.safetensors").read_bytes()
    assert len(list(models.iterdir())) == 2


def test_other_models_stay_on_the_gpu_where_there_is_room(quantize, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management as management

    asked: list[float] = []
    monkeypatch.setattr(management, "free_memory", lambda size, *_, **__: asked.append(size))
    monkeypatch.setattr(management, "unload_all_models", pytest.fail)
    quantize()
    assert len(asked) == 1 and 0 < asked[0] < 10e6


def test_a_deleted_file_is_written_again(host, quantize, models):
    """ComfyUI skips a node whose fingerprint is as before."""
    node = host.node_classes["LensQuantizeModel"]

    def fingerprint() -> str:
        return node.fingerprint_inputs(
            model_name=SINGLE, quantization="nvfp4", file_name="x", overwrite=False
        )

    missing = fingerprint()
    quantize(SINGLE, "nvfp4", "x")
    there = fingerprint()
    assert there != missing and there == fingerprint()
    (models / "x.safetensors").unlink()
    assert fingerprint() == missing
    assert node.fingerprint_inputs(model_name=None, quantization=None, file_name=None) != missing
