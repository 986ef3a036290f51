"""The quality harness on the tiny model: what it says of modes whose effect is known."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import quality
from benchmarks.fidelity import PSNR_MAX
from benchmarks.quality import measure
from benchmarks.quality_harness import Harness, Settings, centre
from benchmarks.quality_models import BAD, PROMPTS, Mode, Subject, from_files, modes, tiny_size
from lens_core.denoiser import LensDenoiser
from lens_core.quant.layer_format import LayerFormat, affine4, int8
from lens_core.quant.linear import dequantize, quantize

CPU = torch.device("cpu")
SETTINGS = Settings(seeds=2, steps=2, size=(256, 256))


def fake(form: LayerFormat) -> Mode:
    """The blocks' linears, their modulation left alone, as ``form`` rounds them. Some in the tiny model have
    inputs that make no whole groups; they stay."""

    def mode(model: LensDenoiser) -> None:
        for name, layer in model.transformer_blocks.named_modules():
            whole = isinstance(layer, nn.Linear) and not (form.group and layer.in_features % form.group)
            if whole and "_mod" not in name:
                layer.weight.copy_(dequantize(quantize(layer.weight, form), torch.bfloat16))

    return mode


def nothing(model: LensDenoiser) -> None:
    """The mode that changes nothing."""


def halved(model: LensDenoiser) -> None:
    """Exactly half the velocity: a power of two does not round."""
    model.proj_out.weight.mul_(0.5)
    model.proj_out.bias.mul_(0.5)


def with_outliers(model: LensDenoiser) -> None:
    """What trained modulation has and random weights have not: one input that is nearly always off, with a
    large weight to every output. bf16 does not care, but the scale of a row is then that weight's, and all
    others of the row round to 0."""
    channel = 7
    last = model.time_text_embed.timestep_embedder.linear_2
    last.weight[channel] = 0
    last.bias[channel] = -20  # SiLU makes -4e-8 of it
    weight = model.norm_out.linear.weight
    weight[:, channel] = 20 * weight.abs().amax(-1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    with torch.inference_mode():
        subject = tiny_size(CPU)
        centre(subject, SETTINGS)
    return subject


@pytest.fixture(scope="module")
def harness(subject: Subject) -> Harness:
    with torch.inference_mode():
        return Harness(subject, SETTINGS)


def test_an_identical_model_is_identical(harness: Harness):
    result = harness.compare(nothing)
    # Cosines of equal vectors, in fp64.
    assert result["velocity"]["cosine, worst"] == pytest.approx(1, abs=1e-12)
    assert result["velocity"]["relative L2, worst"] == 0
    assert result["final latents"]["relative L2, worst"] == 0
    assert result["picture"]["PSNR dB"] == [PSNR_MAX] * 2
    assert result["picture"]["SSIM"] == pytest.approx([1, 1])
    assert result["grid"]["grid energy, ratio"] == result["grid"]["border contrast, ratio"] == 1
    assert result["grid"]["comb"] == harness.reference["comb"]
    assert result["grid"]["comb of the error"] == 1
    assert not result["draws a grid"]


def test_int8_is_nearer_than_int4_by_every_measure(harness: Harness):
    near, far = harness.compare(fake(int8)), harness.compare(fake(affine4))
    for name in ("cosine", "cosine, worst"):
        assert 1 > near["velocity"][name] > far["velocity"][name] > 0.98
        assert 1 > near["final latents"][name] > far["final latents"][name]
    for name in ("relative L2", "relative L2, worst"):
        # 4 times and more: 15 steps of a group's range for 255 of a row's.
        assert 0 < 4 * near["velocity"][name] < far["velocity"][name]
        assert 0 < 3 * near["final latents"][name] < far["final latents"][name]
    for name in ("PSNR dB", "SSIM"):
        assert min(near["picture"][name]) > max(far["picture"][name])
    assert not near["draws a grid"] and not far["draws a grid"]


def test_velocities_are_compared_at_bf16s_latents(harness: Harness):
    """Half the velocity everywhere it is asked; a trajectory of its own would have gone elsewhere."""
    result = harness.compare(halved)
    for step in result["velocity"]["steps"]:
        assert step["relative L2, worst"] == step["relative L2"] == 0.5
        assert step["cosine, worst"] == pytest.approx(1, abs=1e-12)
    assert [step["sigma"] for step in result["velocity"]["steps"]] == harness.levels[:-1].tolist()
    # On its own it ends half way, noise included: sqrt(1/4 + 1/4) of noise and velocity, if these are alike.
    assert 0.3 < result["final latents"]["relative L2"] < 0.9


def test_free_and_forced_agree_on_the_first_step(harness: Harness):
    model = copy.deepcopy(harness.subject.model)
    fake(affine4)(model)
    own, want = harness._draw(model, 1).steps, harness.wanted[1].steps
    assert torch.equal(own[0][0], want[0][0]) and not torch.equal(own[1][0], want[1][0])


def test_random_weights_are_centred(harness: Harness):
    """Without it the latents' mean over the tokens is a grid in bf16's own picture."""
    ends = torch.cat([one.latents for one in harness.wanted]).float()
    raw = Harness(tiny_size(CPU), SETTINGS)
    before = torch.cat([one.latents for one in raw.wanted]).float()
    # A last rest of the rounds: the mean answers to the bias by about 3 / 4.
    assert ends.mean((0, 1)).norm() < 0.15 * before.mean((0, 1)).norm()
    assert raw.reference["grid energy"] > 2 and harness.reference["grid energy"] == pytest.approx(1, abs=0.2)


def test_int4_everywhere_draws_a_grid_where_modulation_has_outliers(subject: Subject):
    """The bad example is found by every detector, formats that leave the modulation alone are not."""
    model = copy.deepcopy(subject.model)
    with_outliers(model)
    trained = Subject(model, subject.texts, subject.decode, CPU)
    results = measure(trained, SETTINGS, {**modes([BAD], CPU), "int4": fake(affine4)})
    bad, good = results["modes"][BAD], results["modes"]["int4"]
    assert results["the detector finds the bad example's grid"] and not good["draws a grid"]
    assert bad["grid"]["grid energy, ratio"] > 2
    assert bad["grid"]["comb"] > 5 > 2 > good["grid"]["comb"]
    name = "RMS of its mean tile / 255"
    assert bad["grid"][name] > 5 > 1 > good["grid"][name]
    name = "error common to all tokens"
    assert bad["velocity"][name] > 2 * good["velocity"][name]


def test_the_command_writes_json_and_table(tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = "--tiny --seeds 2 --steps 2 --size 160x128 --cfg 3 --modes all_linear_int4 --out"
    quality.main([*flags.split(), str(tmp_path)])
    found = json.loads((tmp_path / "quality.json").read_text())
    assert found["settings"] == {"seeds": 2, "steps": 2, "size": [128, 160], "cfg": 3.0}
    assert found["subject"]["weights"] == "random" and "random matrix" in found["subject"]["decoder"]
    assert len(found["modes"][BAD]["picture"]["SSIM"]) == len(found["modes"][BAD]["velocity"]["steps"]) == 2
    table = (tmp_path / "quality.md").read_text()
    assert f"| {BAD} | 0.9" in table and table in capsys.readouterr().out


def test_a_folder_brings_its_own_texts_and_decoder(tiny_folder: Path):
    """And random ones for what is not there."""
    whole = from_files(tiny_folder, None, CPU)
    assert whole.weights == "trained" and whole.text == "; ".join(PROMPTS)
    assert len({text.shape[1] for text in whole.texts}) > 1
    single = tiny_folder.parents[1] / "diffusion_models" / "lens_tiny_bf16.safetensors"
    alone = from_files(single, None, CPU)
    assert alone.text == "random" and "random matrix" in alone.decoder
    drawn = Harness(whole, Settings(1, 1, (128, 128))).wanted[0].picture
    assert drawn.shape == (128, 128, 3) and drawn.std() > 0.05
    bias = whole.model.proj_out.bias.clone()
    measure(whole, Settings(1, 1, (128, 128)), {})
    assert torch.equal(whole.model.proj_out.bias, bias)  # trained weights stay as they are


def test_modes_are_the_selectors_and_the_bad_example(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple] = []

    def quantize_denoiser(model: LensDenoiser, mode: str, device: torch.device) -> None:
        asked.append((model, mode, device))

    policy = SimpleNamespace(MODES={"int8": object(), "float8": object()})
    monkeypatch.setitem(sys.modules, "lens_core.quant.policy", policy)
    selector = SimpleNamespace(quantize_denoiser=quantize_denoiser)
    monkeypatch.setitem(sys.modules, "lens_core.quantized", selector)
    assert list(modes(None, CPU)) == ["int8", "float8", BAD]
    assert list(modes([BAD, "float8"], CPU)) == [BAD, "float8"]
    modes(None, CPU)["float8"](subject.model)
    assert asked == [(subject.model, "float8", CPU)]
    with pytest.raises(SystemExit, match=f"no mode int3; there are int8, float8, {BAD}"):
        modes(["int8", "int3"], CPU)


def test_the_bad_example_rounds_every_linear_to_15_numbers_a_row(subject: Subject):
    model = copy.deepcopy(subject.model)
    modes([BAD], CPU)[BAD](model)
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert len(linears) == 5 + 1 + 12 * len(model.blocks)
    assert max(len(row.unique()) for layer in linears for row in layer.weight) <= 15
    assert min(len(row.unique()) for layer in linears for row in layer.weight) > 8
