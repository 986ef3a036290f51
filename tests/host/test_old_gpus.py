"""A GPU without bfloat16 (Turing): Lens is computed in float32 there, never in float16, and the log says so.

ComfyUI's own decisions run over the properties of such a card; the arithmetic runs on the CPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.compare import relative_l2
from tests.host.fake_gpu import CPU, GPU, FakeGpu

BF16, FP32 = torch.bfloat16, torch.float32
SLOW = "This GPU has no bfloat16, so Lens computes in float32"


@pytest.fixture
def turing(host, tiny, monkeypatch):
    """Sets how much memory the card has for weights; by default too little for fp32."""
    import comfy.model_management as management

    management.unload_all_models()
    own = management.should_use_bf16
    FakeGpu(1 << 40).install(monkeypatch)
    card = SimpleNamespace(major=7, minor=5, name="NVIDIA GeForce RTX 2080", total_memory=8 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _=None: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
    monkeypatch.setattr(management, "should_use_bf16", own)
    assert management.should_use_fp16(GPU) and not management.should_use_bf16(GPU)

    def room(size: float) -> None:
        monkeypatch.setattr(management, "maximum_vram_for_weights", lambda _: size)

    room(0)
    say = host.module("nodes.host.model")._say_slow
    say.cache_clear()
    yield room
    say.cache_clear()
    management.unload_all_models()


def load(host, dtype="auto"):
    return host.run("LensModelLoader", model_name="lens_tiny_bf16.safetensors", dtype=dtype)[0]


def dtypes(model) -> tuple[set, torch.dtype]:
    """Of the weights, and of the arithmetic."""
    return {weight.dtype for weight in model.model.diffusion_model.parameters()}, (
        model.model.get_dtype_inference()
    )


def check_it_computes_in_float32(model, draw, want) -> None:
    """In the picture too: what the blocks hand to each other is fp32 all the way."""
    seen = set()
    for block in model.model.diffusion_model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: seen.update(x.dtype for x in args[0]))
    got = draw(model=model)["samples"]
    assert seen == {FP32}
    assert relative_l2(got, want) < 1e-5


@pytest.mark.parametrize("flags", [(), ("fp16_unet",), ("fp16_unet", "force_fp16")], ids=str)
def test_weights_in_bfloat16_arithmetic_in_float32(host, draw, turing, monkeypatch, caplog, flags):
    """--force-fp16 sets --fp16-unet too."""
    from comfy.cli_args import args

    for flag in flags:
        monkeypatch.setattr(args, flag, True)
    model = load(host)
    assert model.load_device == GPU != CPU
    assert dtypes(model) == ({BF16}, FP32)
    monkeypatch.undo()
    check_it_computes_in_float32(model, draw, draw(model=load(host, "bfloat16"))["samples"])
    assert caplog.text.count(SLOW) == 1
    assert ("Lens is loaded in bfloat16 instead" in caplog.text) == bool(flags)


def test_weights_in_float32_where_there_is_room(host, draw, turing, caplog):
    """No weight is cast at each step then."""
    turing(1 << 40)
    model = load(host)
    assert dtypes(model) == ({FP32}, FP32)
    assert SLOW in caplog.text


def test_a_choice_of_bfloat16_is_the_weights(host, turing, caplog):
    turing(1 << 40)
    for _ in range(2):
        assert dtypes(load(host, "bfloat16")) == ({BF16}, FP32)
    assert caplog.text.count(SLOW) == 1, "said again for each model"


def test_nothing_is_said_to_who_wants_float32(host, turing, monkeypatch, caplog):
    import comfy.model_management as management
    from comfy.cli_args import args

    assert dtypes(load(host, "float32")) == ({FP32}, FP32)
    with monkeypatch.context() as flag:
        flag.setattr(args, "fp32_unet", True)
        assert dtypes(load(host)) == ({FP32}, FP32)
    with monkeypatch.context() as flag:
        flag.setattr(management, "FORCE_FP32", True)
        assert dtypes(load(host)) == ({FP32}, FP32)
    assert SLOW not in caplog.text


def test_nothing_is_said_on_a_cpu_or_a_gpu_that_has_it(host, turing, monkeypatch, caplog):
    import comfy.model_management as management

    monkeypatch.setattr(management, "should_use_bf16", lambda *_, **__: True)
    assert dtypes(load(host)) == ({BF16}, BF16)
    monkeypatch.undo()
    assert dtypes(load(host)) == ({FP32}, FP32)
    assert SLOW not in caplog.text
