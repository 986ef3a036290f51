"""LensDoctor: ComfyUI and the graph's models in the report, parity with ComfyUI's own Lens, and Cancel."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import denoiser_gguf

DENOISER = "lens_tiny_bf16.safetensors"


@pytest.fixture
def report(host):
    """The node's text."""

    def run(**inputs) -> str:
        (text,) = host.run("LensDoctor", **{"files": "", "hash": False, "parity": False, **inputs})
        return text

    return run


def line_of(text: str, name: str) -> str:
    """The only line about it."""
    (found,) = [line for line in text.splitlines() if line[2:].startswith(f"{name} ")]
    return found


@pytest.fixture
def only_the_tiny_models(host, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what other tests of this worker have written: the report names so many files at most."""
    import folder_paths

    for kind, (folders, extensions) in list(folder_paths.folder_names_and_paths.items()):
        kept = [folder for folder in folders if Path(folder).is_relative_to(tiny_models)]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, (kept, extensions))


@pytest.mark.usefixtures("only_the_tiny_models")
def test_alone_it_looks_at_all_that_the_loaders_list(report, tiny_models):
    text = report(files="all", hash=True)
    for title in ("Environment", "ComfyUI", "Fast paths on CPU, float32", "Files"):
        assert title in text.splitlines()
    assert "Models of this graph" not in text and "Parity" not in text
    for name in (DENOISER, "gpt_oss_tiny_mxfp4.safetensors", "flux2_tiny_vae.safetensors", "Lens-tiny/vae"):
        assert f"  {name} " in text, name
    assert "SHA-256 " in text and text.endswith("Result: nothing is broken.")
    assert str(tiny_models.parent) not in text and str(Path.home()) not in text
    assert len(text.splitlines()) < 100


def test_comfyui_and_its_flags(report, monkeypatch):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "output_directory", "/home/joe/pictures")
    monkeypatch.setattr(args, "reserve_vram", 1.5)
    text = report()
    assert line_of(text, "version").split()[-1].startswith("0.")
    flags = line_of(text, "start flags")
    assert "--cpu," in flags and "--reserve-vram 1.5" in flags
    assert "--output-directory (given)" in flags and "joe" not in text
    assert "dynamic VRAM off" in line_of(text, "memory")
    assert "Files" not in text.splitlines(), "none were asked for"


def test_the_graphs_models_are_described(report, tiny):
    text = report(model=tiny.model, clip=tiny.clip, vae=tiny.vae)
    model = line_of(text, "MODEL")
    for part in ("Lens-tiny, not quantised, computes in float32", "no weights patched", "CUDA graphs not"):
        assert part in model
    assert "gpt_oss_tiny_mxfp4.safetensors, experts packed" in line_of(text, "CLIP")
    assert "placement auto" in line_of(text, "CLIP")
    assert "flux2_tiny_vae.safetensors, float32, " in line_of(text, "VAE")


def test_a_lora_and_a_quantised_model_show(report, host, tiny):
    patched = tiny.model.clone()
    weight = "diffusion_model.img_in.weight"
    patched.add_patches({weight: ("diff", (torch.zeros(128, 128),))}, 1.0)
    assert "1 weights patched (LoRA)" in line_of(report(model=patched), "MODEL")
    small, *_ = host.run(
        "LensModelLoader", model_name=DENOISER, dtype="float32", quantization="int8_weight_only"
    )
    assert f"{DENOISER}, quantised, " in line_of(report(model=small), "MODEL")


def test_other_loaders_models_are_described_too(report, host):
    (model,) = host.run("UNETLoader", unet_name=DENOISER, weight_dtype="default")
    text = report(model=model, vae=SimpleNamespace(patcher=model))
    for name in ("MODEL", "VAE"):
        assert "Lens, from another loader than this pack's; no weights patched" in line_of(text, name)


def test_named_files_alone(report):
    text = report(files=f" {DENOISER} \n\nLens-tiny\nlens_tiny_lora.safetensors")
    assert text.count("ok: ") == 4 and "lens_turbo" not in text
    assert "a LoRA" in line_of(text, "lens_tiny_lora.safetensors")


def test_an_unknown_name_is_one_sentence(report):
    with pytest.raises(Exception, match=r"There is no file or folder 'nothing' for a Lens loader\. Give the"):
        report(files="nothing")


def test_a_damaged_file_is_listed_and_marked(report, own_models):
    path = own_models / "diffusion_models" / "cut.safetensors"
    path.write_bytes(b"\x10")
    try:
        texts = [report(files=files) for files in ("cut.safetensors", "all")]
    finally:
        path.unlink()
    for text in texts:
        assert "! cut.safetensors " in text and "BROKEN" in text


@pytest.mark.parametrize("kind", ["bf16", "gguf"])
def test_the_denoiser_is_comfyuis_own(kind, report, own_models):
    name = DENOISER
    if kind == "gguf":
        name = "tiny_parity.gguf"
        denoiser_gguf.write_denoiser(own_models / "diffusion_models" / name, "Q8_0")
    text = report(files=name, parity=True)
    parity = text[text.index("\nParity\n") :]
    assert "as ComfyUI's own Lens in float32, computed in float32: relative L2 " in parity, parity
    error = float(parity.split("relative L2 ")[1].split(",")[0])
    assert 0 < error < 2e-6, "as tests/host/test_denoiser_parity.py has it"


def test_a_wrong_weight_in_the_denoiser_is_noticed(report, host, monkeypatch):
    parity = host.module("lens_core.doctor.parity")
    build = parity.build_denoiser

    def wrong(*arguments):
        model = build(*arguments)
        model.transformer_blocks[1].attn.to_out[0].weight.mul_(1.01)
        return model

    monkeypatch.setattr(parity, "build_denoiser", wrong)
    text = report(files=DENOISER, parity=True)
    assert f"! {DENOISER} " in text and "DIFFERS from ComfyUI's own Lens" in text


def test_another_attention_of_comfyuis_is_not_the_reference(report, monkeypatch):
    """Started with one that computes in another precision, its network still serves."""
    from comfy.ldm.lens import model as lens
    from comfy.ldm.modules.attention import wrap_attn

    def crude(*_, **__):
        raise AssertionError("it must not be asked")

    monkeypatch.setattr(lens, "optimized_attention", wrap_attn(crude))
    assert "as ComfyUI's own Lens" in report(files=DENOISER, parity=True)


def test_cancel_ends_it(report, monkeypatch):
    import comfy.model_management

    left = [15]

    def interrupted() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        report(files="all")
    assert left[0] == -1


def test_it_is_asked_anew_each_time(host):
    node = host.node_classes["LensDoctor"]
    assert node.fingerprint_inputs(files="all") != node.fingerprint_inputs(files="all")
