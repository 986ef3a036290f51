"""What the routes refuse and answer, without a server; tests/server has the requests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HOST = {"Host": "192.168.1.5:8188"}


@pytest.fixture
def routes(host):
    return host.module("nodes.host.routes")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        HOST,
        {**HOST, "Origin": "http://192.168.1.5:8188"},
        {"Host": "Lens.Example", "Origin": "https://lens.example", "Sec-Fetch-Site": "same-origin"},
        {**HOST, "Sec-Fetch-Site": "none"},
    ],
    ids=str,
)
def test_our_own_page_and_programs_may(routes, headers):
    assert routes.why_not_ours(headers) is None


@pytest.mark.parametrize(
    "headers",
    [
        {**HOST, "Origin": "http://["},
        {**HOST, "Origin": "http://192.168.1.5:8188.evil.example"},
        {**HOST, "Origin": "http://192.168.1.5:8188:80"},
        {**HOST, "Origin": ""},
        {"Origin": "http://evil.example"},
        {"Host": "", "Origin": "null"},
        {"Sec-Fetch-Site": "same-origin", **HOST, "Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "Cross-Site", **HOST},
    ],
    ids=str,
)
def test_others_may_not(routes, headers):
    assert "Use ComfyUI's own page" in routes.why_not_ours(headers)


def test_a_second_copy_of_the_pack_adds_no_route_twice(routes, monkeypatch):
    """aiohttp would end the server over it."""
    from aiohttp import web

    table = web.RouteTableDef()
    monkeypatch.setattr(routes.PromptServer, "instance", SimpleNamespace(routes=table), raising=False)
    for _ in range(2):
        routes.register_routes()
    assert sorted(route.path for route in table) == [
        "/lens/feature_cache/clear",
        "/lens/memory",
        "/lens/variants",
    ]
    web.Application().add_routes(table)


def test_without_a_server_there_are_no_routes(routes, monkeypatch):
    monkeypatch.delattr(routes.PromptServer, "instance", raising=False)
    routes.register_routes()


@pytest.fixture
def gpu(host, monkeypatch):
    """Makes the pack believe in a GPU with so many bytes free of 8e9."""
    budget, management = (
        host.module("nodes.host.budget"),
        host.module("nodes.host.budget").comfy.model_management,
    )

    def install(free: float) -> None:
        device = torch.device("cuda", 0)
        monkeypatch.setattr(management, "get_torch_device", lambda: device)
        monkeypatch.setattr(management, "get_total_memory", lambda *_: 8e9)
        monkeypatch.setattr(management, "extra_reserved_memory", lambda: 1000)
        monkeypatch.setattr(budget, "free_for_models", lambda _: int(free) + 1000)
        monkeypatch.setattr(budget, "dtypes_for", lambda *_: (torch.bfloat16, torch.bfloat16))
        monkeypatch.setattr(management, "should_use_bf16", lambda *_, **__: True)
        monkeypatch.setattr(
            host.module("lens_core.denoiser_file"), "_gpu", lambda _: (int(free), (9, 0), "GPU")
        )
        monkeypatch.setattr(host.module("lens_core.file_needs"), "why_no_triton", lambda *_: None)

    return install


def test_on_a_gpu_what_fits_is_proposed(host, gpu):
    budget = host.module("nodes.host.budget")
    choice = budget.Choice("Lens-tiny", encoder="gpt_oss_tiny_mxfp4.safetensors")
    gpu(8e9)
    whole = budget.verdict(choice)
    assert whole.level == "green" and "8.0 GB free" in whole.line
    eighth = budget.verdict(budget.Choice("Lens-tiny", quantization="int8_dynamic"))
    alone = budget.verdict(budget.Choice("Lens-tiny"))
    assert eighth.needed < alone.needed < whole.needed
    gpu(eighth.needed)
    assert budget.verdict(budget.Choice("Lens-tiny")).details[-2:] == (
        "With quantization int8_dynamic it fits whole.",
        "Or a smaller size, fewer pictures at once, other programs closed.",
    )
    gpu(alone.least - 1)
    assert budget.verdict(budget.Choice("Lens-tiny")).level == "red"


def test_auto_follows_what_is_free_and_says_nothing_in_the_log(host, gpu, caplog):
    budget = host.module("nodes.host.budget")
    choice = budget.Choice("Lens-tiny", quantization="auto")
    gpu(80e9)
    roomy = budget.verdict(choice)
    gpu(1e8)
    assert budget.verdict(choice).needed < roomy.needed
    assert "auto" not in caplog.text


def test_a_changed_file_is_looked_at_again(host, models: Path, tiny_models: Path):
    budget = host.module("nodes.host.budget")
    target = models / "lens_changing.safetensors"
    source = tiny_models / "diffusion_models"
    target.write_bytes((source / "lens_tiny_bf16.safetensors").read_bytes())
    assert budget.verdict(budget.Choice(target.name)).level == "green"
    assert budget.variants()[target.name].name == "Lens"
    target.write_bytes(b"no file of weights at all")
    with pytest.raises(Exception, match="lens_changing"):
        budget.verdict(budget.Choice(target.name))
    assert target.name not in budget.variants()
