"""Right files load the same from every layout; files that are not quite right list every difference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_core.config import LENS, LENS_BASE, LENS_TURBO, Variant
from lens_core.encoder import GptOssEncoder
from lens_core.errors import CheckpointError, CheckpointMismatch
from lens_core.loading import load_denoiser, load_encoder, load_vae, open_encoder
from lens_core.weights import open_checkpoint, variant_of

FILES = {
    "denoiser": "diffusion_models/lens_tiny_bf16.safetensors",
    "encoder": "text_encoders/gpt_oss_tiny_mxfp4.safetensors",
    "vae": "vae/flux2_tiny_vae.safetensors",
}
# Three tensors to leave out and one to give another shape, none of which tells a model's sizes.
CHANGED = {
    "denoiser": (
        ["transformer_blocks.1.img_mlp.w2.weight", "norm_out.linear.bias", "txt_norm.2.weight"],
        "transformer_blocks.2.attn.to_out.0.weight",
    ),
    "encoder": (
        [
            "model.layers.5.mlp.experts.down_proj_bias",
            "model.layers.7.self_attn.sinks",
            "model.layers.23.mlp.experts.gate_up_proj_scales",
        ],
        "model.layers.3.mlp.router.weight",
    ),
    "vae": (
        ["decoder.mid.block_1.conv1.weight", "encoder.quant_conv.bias", "bn.running_var"],
        "decoder.conv_out.weight",
    ),
}


def load(component: str, path: Path) -> torch.nn.Module:
    if component == "denoiser":
        return load_denoiser(path, torch.bfloat16)
    return load_encoder(path, None)[0] if component == "encoder" else load_vae(path, torch.float32)


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=FILES)
def component(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def denoiser_file(tiny_models: Path) -> dict[str, Tensor]:
    return load_file(tiny_models / FILES["denoiser"])


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "net."])
def test_prefixed_names_load_the_same_denoiser(
    tiny_models: Path, tmp_path: Path, denoiser_file: dict[str, Tensor], prefix: str
):
    path = tmp_path / "prefixed.safetensors"
    save_file({prefix + name: tensor for name, tensor in denoiser_file.items()}, path)
    assert same_tensors(load("denoiser", path), load("denoiser", tiny_models / FILES["denoiser"]))


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_prefixed_names_load_the_same_vae(tiny_models: Path, tmp_path: Path, prefix: str):
    tensors = load_file(tiny_models / FILES["vae"])
    path = tmp_path / "prefixed.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    assert same_tensors(load("vae", path), load("vae", tiny_models / FILES["vae"]))


def test_encoder_names_without_model_load_the_same_encoder(tiny_models: Path, tmp_path: Path):
    tensors = load_file(tiny_models / FILES["encoder"])
    path = tmp_path / "bare.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path)
    assert same_tensors(load("encoder", path), load("encoder", tiny_models / FILES["encoder"]))


def test_a_lens_folder_its_parts_and_the_single_file_hold_the_same(
    tiny_models: Path, tiny_folder: Path, component: str
):
    part = {"denoiser": "transformer", "encoder": "text_encoder", "vae": "vae"}[component]
    whole = load(component, tiny_folder)
    assert same_tensors(load(component, tiny_folder / part), whole)
    assert same_tensors(load(component, tiny_models / FILES[component]), whole)


def test_the_encoder_needs_neither_norm_nor_head(tiny_models: Path, tmp_path: Path):
    tensors = load_file(tiny_models / FILES["encoder"])
    for name in ("model.norm.weight", "lm_head.weight"):
        del tensors[name]
    save_file(tensors, tmp_path / "x.safetensors")
    assert same_tensors(
        load("encoder", tmp_path / "x.safetensors"), load("encoder", tiny_models / FILES["encoder"])
    )


def test_weights_are_cast_but_packed_experts_stay_bytes(tiny_models: Path):
    encoder, _ = load_encoder(tiny_models / FILES["encoder"], torch.float32)
    dtypes = {name.rpartition("_")[2]: tensor.dtype for name, tensor in encoder.state_dict().items()}
    assert dtypes["blocks"] == dtypes["scales"] == torch.uint8
    assert dtypes["bias"] == torch.float32
    stored, _ = load_encoder(tiny_models / FILES["encoder"], None)
    assert stored.embed_tokens.weight.dtype == torch.bfloat16


def test_a_loaded_model_is_ready_for_inference(tiny_models: Path, component: str):
    model = load(component, tiny_models / FILES[component])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


def test_on_tensor_counts_every_tensor_and_may_cancel(tiny_models: Path):
    calls: list[tuple[int, int]] = []
    load_denoiser(tiny_models / FILES["denoiser"], torch.bfloat16, on_tensor=lambda *c: calls.append(c))
    total = len(open_checkpoint(tiny_models / FILES["denoiser"]).header)
    assert calls == [(done, total) for done in range(1, total + 1)]

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        load_denoiser(tiny_models / FILES["denoiser"], torch.bfloat16, on_tensor=stop)


def test_every_difference_is_listed(tiny_models: Path, tmp_path: Path, component: str):
    tensors = load_file(tiny_models / FILES[component])
    removed, reshaped = CHANGED[component]
    shape = list(tensors[reshaped].shape)
    for name in removed:
        del tensors[name]
    tensors[reshaped] = torch.zeros(shape[0] + 1, *shape[1:])
    tensors |= {"extra.one": torch.zeros(1), "extra.two": torch.zeros(2)}
    save_file(tensors, tmp_path / "nearly.safetensors")
    with pytest.raises(CheckpointMismatch) as caught:
        load(component, tmp_path / "nearly.safetensors")
    error, message = caught.value, str(caught.value)
    assert len(error.missing) == 3
    assert sorted(error.unexpected) == ["extra.one", "extra.two"]
    ((name, want, got),) = error.wrong_shape
    assert (list(want), list(got)) == (shape, [shape[0] + 1, *shape[1:]])
    assert message.startswith("nearly.safetensors does not hold the tensors that this model needs.")
    for part in ("Missing (3)", "Unexpected (2)", "Wrong shape (1)", *error.missing, *error.unexpected, name):
        assert part in message
    assert f"should be {shape}, is {[shape[0] + 1, *shape[1:]]}" in message
    assert "Download the file again" in message
    if component == "denoiser":
        assert sorted(error.missing) == sorted(removed)
        assert name == reshaped


@pytest.mark.parametrize(
    ("component", "name", "shape"),
    [
        ("denoiser", "img_in.weight", (7,)),
        ("denoiser", "img_in.weight", (128, 128, 1, 1, 1)),
        ("denoiser", "txt_norm.0.weight", ()),
        ("encoder", "model.embed_tokens.weight", (7,)),
        ("encoder", "model.layers.0.self_attn.sinks", (0,)),
        ("encoder", "model.layers.0.mlp.experts.down_proj_scales", (7,)),
        ("vae", "decoder.conv_in.weight", (7,)),
        ("vae", "encoder.down.1.block.0.conv1.weight", (7, 7, 3, 3)),
    ],
)
def test_a_tensor_that_tells_the_sizes_may_be_wrong_too(
    tiny_models: Path, tmp_path: Path, component: str, name: str, shape: tuple[int, ...]
):
    tensors = load_file(tiny_models / FILES[component])
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    save_file(tensors, tmp_path / "nearly.safetensors")
    with pytest.raises(CheckpointError, match=r"nearly\.safetensors"):
        load(component, tmp_path / "nearly.safetensors")


@pytest.mark.parametrize("name", ["img_in.weight", "txt_norm.0.weight"])
def test_a_missing_tensor_that_tells_the_sizes_is_named(
    tmp_path: Path, denoiser_file: dict[str, Tensor], name: str
):
    del denoiser_file[name]
    save_file(denoiser_file, tmp_path / "nearly.safetensors")
    with pytest.raises(CheckpointError, match=rf"nearly\.safetensors has no tensor {name}.*[Dd]ownload"):
        load("denoiser", tmp_path / "nearly.safetensors")


def test_one_tensor_under_two_names_is_refused(tmp_path: Path, denoiser_file: dict[str, Tensor]):
    denoiser_file["transformer.img_in.weight"] = torch.zeros_like(denoiser_file["img_in.weight"])
    save_file(denoiser_file, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match=r"img_in\.weight"):
        load("denoiser", tmp_path / "twice.safetensors")


def test_integers_in_place_of_weights_are_refused(tmp_path: Path, denoiser_file: dict[str, Tensor]):
    denoiser_file["norm_out.linear.weight"] = denoiser_file["norm_out.linear.weight"].to(torch.int8)
    save_file(denoiser_file, tmp_path / "int8.safetensors")
    with pytest.raises(CheckpointError, match=r"int8\.safetensors"):
        load("denoiser", tmp_path / "int8.safetensors")


@pytest.fixture
def encoder_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny encoder without a tokenizer."""
    return Path(shutil.copytree(tiny_folder / "text_encoder", tmp_path / "lens" / "text_encoder"))


@pytest.mark.parametrize("place", [".", "tokenizer", "../tokenizer", ".."])
def test_the_tokenizer_is_found_in_or_beside_the_encoder(tiny_folder: Path, encoder_folder: Path, place: str):
    (encoder_folder / place).mkdir(exist_ok=True)
    shutil.copy(tiny_folder / "tokenizer" / "tokenizer.json", encoder_folder / place)
    assert load_encoder(encoder_folder, None)[1].encode("a red")


def test_a_missing_tokenizer_says_where_it_was_looked_for(encoder_folder: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(CheckpointError, match=r"Copy gpt-oss-20b's tokenizer\.json") as caught:
        _ = open_encoder(encoder_folder, [elsewhere]).tokenizer
    places = [encoder_folder, encoder_folder / "tokenizer", encoder_folder.parent / "tokenizer"]
    places += [encoder_folder.parent, elsewhere]
    message = str(caught.value)
    assert f"there is no tokenizer.json in {', '.join(map(str, places))}." in message
    assert message.endswith(f" into {encoder_folder}.")


@pytest.mark.parametrize("place", ["folder", "file"])
def test_other_places_for_a_tokenizer_may_be_folders_or_files(
    tiny_folder: Path, encoder_folder: Path, place: str
):
    where = tiny_folder / "tokenizer"
    places = [encoder_folder / "missing", where if place == "folder" else where / "tokenizer.json"]
    assert open_encoder(encoder_folder, places).tokenizer.encode("a red")


def test_a_single_files_missing_tokenizer_is_looked_for_in_its_folder(tiny_models: Path, tmp_path: Path):
    tensors = load_file(tiny_models / FILES["encoder"])
    del tensors["tokenizer_json"]
    save_file(tensors, tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors holds no tokenizer") as caught:
        load_encoder(tmp_path / "encoder.safetensors", None)
    assert f" in {tmp_path}, " in str(caught.value)
    shutil.copy(tiny_models / "lens" / "Lens-tiny" / "tokenizer" / "tokenizer.json", tmp_path)
    assert load_encoder(tmp_path / "encoder.safetensors", None)[1].encode("a red")


@pytest.mark.parametrize("content", [b'{"version": ', b"", b"{}", b"[]", b"\xff\xfe\x00\x01"])
def test_a_broken_tokenizer_file_is_named(encoder_folder: Path, content: bytes):
    (encoder_folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"[Dd]ownload the file again") as caught:
        load_encoder(encoder_folder, None)
    assert str(encoder_folder / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("content", [b'{"version": ', b"\xff\xfe\x00\x01"])
def test_a_broken_embedded_tokenizer_is_named(tiny_models: Path, tmp_path: Path, content: bytes):
    tensors = load_file(tiny_models / FILES["encoder"])
    tensors["tokenizer_json"] = torch.tensor(list(content), dtype=torch.uint8)
    save_file(tensors, tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"the tokenizer in encoder\.safetensors is not"):
        load_encoder(tmp_path / "encoder.safetensors", None)


def test_a_tokenizer_of_another_model_is_refused(encoder_folder: Path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(encoder_folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"has no token <\|start\|>, <\|message\|>"):
        load_encoder(encoder_folder, None)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("lens_bf16.safetensors", LENS),
        ("Lens", LENS),
        ("lens_turbo_bf16.safetensors", LENS_TURBO),
        ("Lens-Turbo-Diffusers", LENS_TURBO),
        ("lensturbo.safetensors", LENS_TURBO),
        ("Lens-Base", LENS_BASE),
        ("lens_base_mxfp8.safetensors", LENS_BASE),
        ("lens-based-mix.safetensors", LENS),
        ("database", LENS),
    ],
)
def test_the_variant_is_read_off_the_name(name: str, variant: Variant):
    assert variant_of(name) == variant
    assert variant_of(name, {"format": "pt"}) == variant


def test_metadata_outweighs_the_name():
    assert variant_of("lens_turbo.safetensors", {"lens.variant": "Lens-Base"}) == LENS_BASE
    assert variant_of("lens_turbo.safetensors", {"lens.variant": "Lens"}) == LENS
    assert variant_of("renamed.safetensors", {"lens.variant": "Lens-Turbo"}) == LENS_TURBO


def test_the_tiny_single_files_say_their_variant(tiny_models: Path, tmp_path: Path):
    turbo = tiny_models / "diffusion_models" / "lens_turbo_tiny_bf16.safetensors"
    renamed = Path(shutil.copy(turbo, tmp_path / "my_favourite.safetensors"))
    assert variant_of(renamed.name, open_checkpoint(renamed).metadata) == LENS_TURBO


def test_the_variants_have_the_published_settings():
    settings = {variant.name: (variant.steps, variant.cfg) for variant in (LENS, LENS_TURBO, LENS_BASE)}
    assert settings == {"Lens": (20, 5.0), "Lens-Turbo": (4, 1.0), "Lens-Base": (50, 5.0)}


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_an_encoder_changed_since_it_was_opened_is_not_read(change: str, tiny_models: Path, tmp_path: Path):
    """Its header would place other bytes under the names."""
    path = tmp_path / "encoder.safetensors"
    shutil.copy(tiny_models / "text_encoders" / "gpt_oss_tiny_mxfp4.safetensors", path)
    file = open_encoder(path)
    path.unlink()
    if change == "replaced":
        shutil.copy(tiny_models / "text_encoders" / "gpt_oss_tiny_nvfp4.safetensors", path)
    with pytest.raises(CheckpointError, match="changed or removed since it was chosen"):
        file.load(GptOssEncoder(file.config, dtype=torch.bfloat16, device="meta"), torch.bfloat16)
