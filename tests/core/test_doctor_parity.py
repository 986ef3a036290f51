"""Parity on tiny models: equal to the references, and a wrong weight in any component is noticed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from lens_core.doctor import Finding, parity, references
from lens_core.loading import open_encoder
from lens_core.text_encoder import TextEncoder

CPU = torch.device("cpu")
FOLDERS = {"encoder": "text_encoder", "vae": "vae"}
COMPARE: dict[str, Callable[..., Finding]] = {
    "encoder": parity.encoder_parity,
    "vae": parity.vae_parity,
}


def compare(component: str, path: Path, dtype: torch.dtype = torch.float32) -> Finding:
    place = {"device": CPU, "dtype": dtype}
    return parity.tried(component, lambda: COMPARE[component](path, place))


@pytest.fixture(params=FOLDERS)
def component(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(component: str, tiny_folder: Path) -> Path:
    return tiny_folder / FOLDERS[component]


@pytest.fixture
def wrong(component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the component is a tenth larger once it is loaded."""
    read, load = TextEncoder.read, parity.load_vae

    def read_wrong(text: TextEncoder, *arguments: object, **options: object) -> None:
        before = text.is_read
        read(text, *arguments, **options)
        if not before:
            text.model.layers[3].self_attn.o_proj.weight.mul_(1.1)

    def load_wrong(*arguments: object) -> object:
        vae = load(*arguments)
        vae.model.decoder.conv_in.weight.mul_(1.1)
        return vae

    monkeypatch.setattr(TextEncoder, "read", read_wrong)
    monkeypatch.setattr(parity, "load_vae", load_wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_components_are_their_references(component: str, path: Path, dtype: torch.dtype):
    finding = compare(component, path, dtype)
    assert not finding.broken, finding.text
    assert finding.facts[finding.facts["judged"]] > 0, "a thing compared with itself"
    spelled = str(dtype).removeprefix("torch.")
    assert f"computed in {spelled}: relative L2 " in finding.text
    why = "float32 summed in another order" if dtype == torch.float32 else "itself loses in bfloat16"
    assert why in finding.text


@pytest.mark.usefixtures("wrong")
def test_a_wrong_weight_is_noticed(component: str, path: Path):
    finding = compare(component, path)
    assert finding.broken and "DIFFERS from" in finding.text
    # One layer of 24, and the first of the decoder, which a norm follows.
    assert finding.facts["median"] > 1e-3


@pytest.mark.parametrize(
    "name", ["text_encoders/gpt_oss_tiny_nvfp4.safetensors", "vae/flux2_tiny_vae.safetensors"]
)
def test_single_files_are_their_references_too(name: str, tiny_models: Path):
    component = "vae" if name.startswith("vae") else "encoder"
    assert not compare(component, tiny_models / name).broken


def test_a_reference_holds_weights_only_while_its_blocks_run(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    fill, real = references.fill, []

    def watched(model: nn.Module, blocks: list[nn.Module], *arguments: Any) -> None:
        def count(*_: object) -> None:
            real.append(sum(not any(x.is_meta for x in block.parameters()) for block in blocks))

        fill(model, blocks, *arguments)
        for block in blocks:
            block.register_forward_pre_hook(count)

    monkeypatch.setattr(references, "fill", watched)
    text = TextEncoder(open_encoder(tiny_folder), torch.float32)
    text.read()
    features = references.transformers_features(text, [1, 2, 3], {"device": CPU, "dtype": torch.float32})
    assert features.shape == (3, 4, text.file.config.hidden_size)
    assert real == [1] * 24


def test_where_memory_is_short_it_says_what_it_needs(
    component: str, path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5e8))
    finding = compare(component, path)
    assert not finding.broken
    assert "not compared: comparing needs about" in finding.text and "0.5 GB are free" in finding.text


def test_a_missing_transformers_is_named_with_the_pip_line(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    finding = compare("encoder", tiny_folder / "text_encoder")
    assert not finding.broken and "pip install 'transformers>=4.55'" in finding.text


def test_numbers_that_are_none_are_no_parity():
    tokens = torch.randn(4, 8)
    broken = tokens.clone()
    broken[1, 2] = float("nan")
    assert parity.compared("it", broken, lambda _: tokens, torch.float32).broken
    assert not parity.compared("it", tokens, lambda _: tokens, torch.float32).broken


def test_sixteen_bits_may_lose_what_the_reference_loses():
    exact = torch.randn(64, 32)
    rounded = {torch.float32: exact, torch.bfloat16: exact + 1e-2 * torch.randn(64, 32)}
    for error, broken in ((1.2e-2, False), (2e-2, True)):
        got = exact + error * torch.randn(64, 32)
        assert parity.compared("it", got, rounded.__getitem__, torch.bfloat16).broken is broken
