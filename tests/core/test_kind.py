"""The detector: component, layout, variant and precision of every kind of file, from its header alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_core.config import LENS, LENS_TURBO, DenoiserConfig, EncoderConfig, Variant
from lens_core.denoiser import LensDenoiser
from lens_core.encoder import GptOssEncoder
from lens_core.errors import CheckpointError, CheckpointMismatch
from lens_core.loading import load_denoiser, load_encoder, open_denoiser, open_encoder
from lens_core.quantize_file import quantize_file
from lens_core.weights import inspect
from lens_core.weights.tensor_info import TensorInfo
from tests import denoiser_quantized as files
from tests import encoder_files
from tests.core.denoiser_layouts import LAYOUTS, assert_holds
from tests.core.test_loading import component, load, same_tensors
from tests.core.test_wrong_files import OTHER_MODELS
from tests.sparse_files import write_sparse

__all__ = ["component"]
DENOISER = "diffusion_models/lens_turbo_tiny_bf16.safetensors"
MXFP4 = "text_encoders/gpt_oss_tiny_mxfp4.safetensors"
VAE = "vae/flux2_tiny_vae.safetensors"
# Prefixes that the components have beside each other, one row by ComfyUI, one by its older files, one bare.
PREFIXES = [
    ("model.diffusion_model.", "text_encoders.gpt_oss.transformer.", "vae."),
    ("diffusion_model.", "cond_stage_model.", "first_stage_model."),
    ("", "text_encoder.", "vae."),
    ("transformer.", "text_encoders.", "vae."),
]


@pytest.mark.parametrize(
    ("file", "component", "layout", "variant", "precision"),
    [
        (DENOISER, "denoiser", "single file", LENS_TURBO, "BF16"),
        ("lens/Lens-tiny/transformer", "denoiser", "folder of 2 shards", LENS, "F32"),
        ("lens/Lens-Turbo-tiny/transformer", "denoiser", "folder of 2 shards", LENS_TURBO, "F32"),
        (MXFP4, "encoder", "single file", None, "MXFP4 experts"),
        (
            "text_encoders/gpt_oss_tiny_nvfp4.safetensors",
            "encoder",
            "ComfyUI single file",
            None,
            "nvfp4 experts",
        ),
        ("lens/Lens-tiny/text_encoder", "encoder", "folder of 3 shards", None, "MXFP4 experts"),
        (VAE, "vae", "single file", None, "F32"),
        ("lens/Lens-tiny/vae", "vae", "folder with one file", None, "F32"),
    ],
)
def test_published_files(
    tiny_models: Path, file: str, component: str, layout: str, variant: Variant | None, precision: str
):
    [kind] = inspect(tiny_models / file)
    assert (kind.component, kind.layout) == (component, layout)
    assert (kind.variant, kind.quantisation) == (variant, precision)
    assert all(path.is_file() and path.is_relative_to(tiny_models / file) for path in kind.paths)


def test_a_whole_folder_is_its_three_components(tiny_folder: Path):
    kinds = inspect(tiny_folder)
    assert [kind.component for kind in kinds] == ["denoiser", "encoder", "vae"]
    assert [kind.what for kind in kinds] == ["a Lens denoiser", "a GPT-OSS encoder", "a FLUX.2 VAE"]
    assert [len(kind.paths) for kind in kinds] == [2, 3, 1]


PRECISIONS = {
    **dict.fromkeys(["float8_e4m3fn", "float8_e5m2"], "fp8 with scales"),
    **dict.fromkeys(["scaled", "scaled e5m2", "scaled, full precision"], "fp8 with scales"),
    **dict.fromkeys(["int8_tensorwise", "int8 by row", "int8 turned", "int8 turned, as params"], "int8"),
    "convrot_w4a4": "W4A4 ConvRot",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    **dict.fromkeys(["sdnq", "sdnq in fp32", "sdnq by 32, not flat"], "SDNQ uint4"),
    **{kind: kind for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    # Few of the tiny denoiser's rows are long enough for the blocks of these; the others are Q8_0.
    **dict.fromkeys(["Q4_K", "Q5_K"], "Q8_0"),
    "Q6_K": "mixed: Q8_0, Q6_K",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_denoisers(layout: str, tmp_path: Path):
    path, _ = LAYOUTS[layout](tmp_path)
    [kind] = inspect(path)
    assert (kind.component, kind.what, kind.variant) == ("denoiser", "a Lens denoiser", LENS)
    assert kind.quantisation == PRECISIONS[layout]
    assert (kind.layout == "GGUF") == (path.suffix == ".gguf")


def test_a_file_that_this_pack_quantised_names_its_mode(tiny_models: Path, tmp_path: Path):
    out = quantize_file(open_denoiser(tiny_models / DENOISER), "int4_weight_only", tmp_path / "x.safetensors")
    [kind] = inspect(out)
    assert (kind.quantisation, kind.variant) == ("int4_weight_only", LENS_TURBO)


@pytest.mark.parametrize(
    ("layout", "called", "precision"),
    [
        ("original", "OpenAI's original layout", "MXFP4 experts"),
        ("transformers", "single file", "BF16"),
        ("comfyui", "ComfyUI single file", "BF16"),
        ("gguf", "GGUF", "MXFP4 experts"),
    ],
)
def test_layouts_of_the_encoder(tiny_models: Path, tmp_path: Path, layout: str, called: str, precision: str):
    weights = load_file(tiny_models / MXFP4)
    del weights["tokenizer_json"]
    path = tmp_path / "encoder"
    if layout == "gguf":
        encoder_files.write_gguf(path, weights)
    elif layout == "original":
        save_file(encoder_files.original(weights), path)
    else:
        write = encoder_files.dense if layout == "transformers" else encoder_files.comfy_dense
        save_file(write(weights, torch.bfloat16), path)
    [kind] = inspect(path)
    assert (kind.component, kind.what) == ("encoder", "a GPT-OSS encoder")
    assert (kind.layout, kind.quantisation) == (called, precision)


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_other_models_are_named_and_are_no_component(tmp_path: Path, what: str):
    save_file({name: torch.zeros(2, 2) for name in OTHER_MODELS[what]}, tmp_path / "x.safetensors")
    [kind] = inspect(tmp_path / "x.safetensors")
    assert kind.what == what
    assert kind.component == ("lora" if what == "a LoRA" else "")
    assert kind.variant is None


def all_in_one(tiny_models: Path, path: Path, prefixes: tuple[str, str, str]) -> Path:
    tensors: dict[str, Tensor] = {}
    for file, prefix in zip((DENOISER, MXFP4, VAE), prefixes, strict=True):
        tensors |= {prefix + name: tensor for name, tensor in load_file(tiny_models / file).items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("prefixes", PREFIXES)
def test_an_all_in_one_file_is_its_parts(tiny_models: Path, tmp_path: Path, prefixes: tuple[str, str, str]):
    kinds = inspect(all_in_one(tiny_models, tmp_path / "lens_turbo.safetensors", prefixes))
    assert [kind.component for kind in kinds] == ["denoiser", "encoder", "vae"]
    assert {kind.layout for kind in kinds} == {"all-in-one file"}
    assert [kind.quantisation for kind in kinds] == ["BF16", "MXFP4 experts", "F32"]
    assert kinds[0].variant == LENS_TURBO


@pytest.mark.parametrize("prefixes", PREFIXES)
def test_each_loader_takes_its_part_out_of_an_all_in_one_file(
    tiny_models: Path, tmp_path: Path, component: str, prefixes: tuple[str, str, str]
):
    path = all_in_one(tiny_models, tmp_path / "x.safetensors", prefixes)
    want = load(component, tiny_models / {"denoiser": DENOISER, "encoder": MXFP4, "vae": VAE}[component])
    assert same_tensors(load(component, path), want)
    assert load_encoder(path, None)[1].encode("a red"), "the tokenizer is in it too"


def test_a_stray_tensor_of_the_own_component_is_still_an_error(
    tiny_models: Path, tmp_path: Path, component: str
):
    path = all_in_one(tiny_models, tmp_path / "x.safetensors", PREFIXES[0])
    prefix = PREFIXES[0][["denoiser", "encoder", "vae"].index(component)]
    save_file({**load_file(path), f"{prefix}extra.one": torch.zeros(1)}, path)
    with pytest.raises(CheckpointMismatch) as caught:
        load(component, path)
    assert caught.value.unexpected == [f"{prefix}extra.one"]
    for other in {"denoiser", "encoder", "vae"} - {component}:
        load(other, path)


def test_a_quantised_denoiser_and_encoder_may_share_a_file(tiny_models: Path, tmp_path: Path):
    """Each has formats beside its weights, or in the metadata, that mean nothing to the other."""
    denoiser = tmp_path / "denoiser.safetensors"
    written = files.write_comfy(denoiser, "mxfp8", prefix=PREFIXES[0][0], in_metadata=True)
    with safe_open(denoiser, "pt") as file:
        told = json.loads(file.metadata()["_quantization_metadata"])
    told["layers"][f"{PREFIXES[0][1]}layers.0.mlp.experts.gate_up_proj"] = {"format": "nvfp4"}
    nvfp4 = tiny_models / "text_encoders" / "gpt_oss_tiny_nvfp4.safetensors"
    encoder = {PREFIXES[0][1] + name: tensor for name, tensor in load_file(nvfp4).items()}
    path = tmp_path / "x.safetensors"
    save_file({**load_file(denoiser), **encoder}, path, {"_quantization_metadata": json.dumps(told)})
    assert [kind.quantisation for kind in inspect(path)] == ["mxfp8", "nvfp4 experts"]
    assert_holds(load_denoiser(path, torch.float32), written)
    assert same_tensors(load("encoder", path), load("encoder", nvfp4))


def test_of_another_models_checkpoint_only_what_is_ours_counts(tiny_models: Path, tmp_path: Path):
    vae = {f"vae.{name}": tensor for name, tensor in load_file(tiny_models / VAE).items()}
    other = {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}
    save_file({**vae, **other}, tmp_path / "x.safetensors")
    [kind] = inspect(tmp_path / "x.safetensors")
    assert (kind.component, kind.layout) == ("vae", "all-in-one file")


def test_headers_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 20 GB that are not there to be read; reading a tensor is an error."""
    denoiser = LensDenoiser(DenoiserConfig(), dtype=torch.bfloat16, device="meta").state_dict()
    encoder = GptOssEncoder(EncoderConfig(), dtype=torch.bfloat16, device="meta").state_dict()
    write_sparse(tmp_path / "lens.safetensors", denoiser)
    write_sparse(tmp_path / "encoder.safetensors", {f"model.{key}": value for key, value in encoder.items()})

    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorInfo, "bytes", read)
    kinds = [kind for name in ("lens", "encoder") for kind in inspect(tmp_path / f"{name}.safetensors")]
    assert [kind.component for kind in kinds] == ["denoiser", "encoder"]
    assert sum((tmp_path / f"{name}.safetensors").stat().st_size for name in ("lens", "encoder")) > 20e9
    # Their sizes too, on the way to a module.
    assert open_denoiser(tmp_path / "lens.safetensors").config == DenoiserConfig()
    assert open_encoder(tmp_path / "encoder.safetensors").config == EncoderConfig()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"GGUF\x03", b"<html>", bytes(64)])
def test_what_cannot_be_opened_is_an_error_in_words(tmp_path: Path, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        inspect(tmp_path / "x.safetensors")


def test_a_folder_that_lacks_a_shard_is_an_error_in_words(tiny_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_folder / "transformer", tmp_path / "transformer"))
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing: diffusion_pytorch_model-00002"):
        inspect(folder)
