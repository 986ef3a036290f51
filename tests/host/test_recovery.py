"""Out of memory at each stage: once, and the result is the same; always, and an error with sizes says so."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.host.fake_gpu import FakeGpu
from tests.host.shortage import Shortage, always, before, first, shorten

STEPS = 3
EMPTY = {"samples": torch.zeros(1, 128, 6, 4)}
SIZES = re.compile(r"\d+\.\d\d GB are needed, \d+\.\d\d GB are free")


@pytest.fixture
def short(host, tiny, monkeypatch):
    """Makes a stage run short of memory."""
    return shorten(host, tiny, monkeypatch)


@pytest.fixture
def stages(host, tiny, draw):
    """Each stage as a call that returns tensors to compare."""

    def loaded(node: str, **inputs: Any) -> list[torch.Tensor]:
        model = host.run(node, **inputs)[0]
        module = model.model if node == "LensModelLoader" else model.first_stage_model
        return list(module.state_dict().values())

    return {
        "load model": lambda: loaded("LensModelLoader", model_name="Lens-tiny", dtype="float32"),
        "load vae": lambda: loaded("LensVAELoader", vae_name="flux2_tiny_vae.safetensors"),
        "encode": lambda: [
            host.run("LensTextEncode", clip=tiny.clip, prompt="a red circle", negative="")[0][0][0]
        ],
        "sample": lambda: [draw(steps=STEPS)["samples"]],
        "decode": lambda: [host.run("LensVAEDecode", latent=EMPTY, vae=tiny.vae)[0]],
    }


ALL = ["load model", "load vae", "encode", "sample", "decode"]
WORDS = {
    "load model": ("while loading Lens-tiny", "quantised already"),
    "load vae": ("while loading flux2_tiny_vae", "--cpu-vae"),
    "encode": ("while encoding the prompt", "placement 'cpu'"),
    "sample": ("while sampling", "a size of 48x80 or less", "int8_dynamic or uint4_sdnq", "--reserve-vram"),
    "decode": ("while decoding", "VAE Decode (Tiled)", "smaller pictures"),
}


@pytest.mark.parametrize("stage", ALL)
def test_once_is_the_same_result(stages, short, management, caplog, stage):
    want = stages[stage]()
    management.load_models_gpu([])
    shortage = short(stage, first)
    got = stages[stage]()
    assert len(got) == len(want) and all(map(torch.equal, got, want))
    assert not shortage.leaked, "the first attempt's tensors were there when the second began"
    said = [record.message for record in caplog.records if "tried once more with less" in record.message]
    assert len(said) == 1 and WORDS[stage][0] in said[0]
    caplog.clear()
    assert all(map(torch.equal, stages[stage](), want)) and not caplog.records


@pytest.mark.parametrize("stage", ALL)
def test_always_is_one_error_and_the_next_works(stages, short, management, monkeypatch, caplog, stage):
    want = stages[stage]()
    shortage = short(stage, always)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        stages[stage]()
    monkeypatch.undo()
    error = caught.value
    assert type(error).__name__ == "OutOfMemory" and management.is_oom(error)
    assert error.__cause__ is None and error.__context__ is None, "more than one error"
    message = str(error)
    assert message.startswith("CUDA out of memory") and "\n" not in message
    assert all(words in message for words in WORDS[stage]), message
    assert SIZES.search(message) or stage == "load vae", message
    # Decoding is tried whole, then with all else unloaded, then in two thirds of the memory, then in tiles.
    assert shortage.calls == (4 if stage == "decode" else 2)
    assert not shortage.leaked
    assert not management.loaded_models()
    assert all(map(torch.equal, stages[stage](), want))


@pytest.mark.parametrize("stage", ALL)
def test_other_errors_and_cancel_pass(stages, short, management, stage):
    class Other(Exception):
        pass

    for kind in (Other, management.InterruptProcessingException, MemoryError):

        def fails(call: int, kind=kind) -> bool:
            raise kind

        shortage = short(stage, fails)
        with pytest.raises(kind):
            stages[stage]()
        assert shortage.calls == 1
        shortage.fails = lambda call: False


@pytest.mark.parametrize("stage", ["encode", "sample", "decode"])
def test_cancel_during_the_second_attempt(tiny, stages, short, management, stage):
    want = stages[stage]()

    def fails(call: int) -> bool:
        if call == 2:
            management.interrupt_current_processing(True)
            management.throw_exception_if_processing_interrupted()
        return call == 1

    short(stage, fails)
    with pytest.raises(management.InterruptProcessingException):
        stages[stage]()
    assert not tiny.model.model.streamed and tiny.clip.cond_stage_model.placement == "auto"
    assert all(map(torch.equal, stages[stage](), want))


def test_models_are_unloaded_in_between(tiny, stages, short, management):
    """All others, and the denoiser before it is loaded again."""
    management.load_models_gpu([tiny.clip.patcher, tiny.vae.patcher])
    shortage = short("sample", first)
    stages["sample"]()
    assert [patcher.model for patcher in shortage.loaded] == [tiny.model.model]


@pytest.fixture
def gpu(management, monkeypatch):
    return FakeGpu(1 << 40).install(monkeypatch)


def test_quantising_goes_on_on_the_cpu(host, gpu, management, monkeypatch):
    """Where the GPU has no room for one weight."""
    quantised = {"model_name": "Lens-tiny", "dtype": "float32", "quantization": "int8_weight_only"}
    want = host.run("LensModelLoader", **quantised)[0].model.state_dict()
    policy = host.module("lens_core.quant.policy")
    pack, devices = policy.pack, []

    def short(weight, mode, device):
        devices.append(str(device))
        if len(devices) > 2 and str(device) == "cpu:0":
            raise torch.OutOfMemoryError("test")
        return pack(weight, mode, device)

    monkeypatch.setattr(policy, "pack", short)
    model = host.run("LensModelLoader", **quantised)[0]
    assert devices[:3] == 3 * ["cpu:0"] and set(devices[3:]) == {"cpu"}
    got = model.model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert str(model.load_device) == "cpu:0"


def test_loading_the_vae_onto_the_gpu_runs_short(host, tiny, management, monkeypatch):
    """ComfyUI's own way out would decode on the GPU with weights that never came there."""
    (want,) = host.run("LensVAEDecode", latent=EMPTY, vae=tiny.vae)
    for fails, calls in ((first, 2), (lambda call: call < 3, 3)):
        management.unload_all_models()
        shortage = Shortage(fails)
        with monkeypatch.context() as patch:
            patch.setattr(
                tiny.vae.patcher, "partially_load", before(tiny.vae.patcher.partially_load, shortage)
            )
            (image,) = host.run("VAEDecode", samples=EMPTY, vae=tiny.vae)
        assert shortage.calls == calls and not shortage.leaked
        torch.testing.assert_close(image, want)
        assert tiny.vae.patcher in management.loaded_models()


def test_the_last_resort_are_small_tiles(host, tiny, management, monkeypatch):
    """Of 32 x 32 latents: of ComfyUI's own, 64 x 64, one would be the whole of this picture."""
    decode, sizes = tiny.vae.first_stage_model.decode, []

    def short(samples: torch.Tensor, **way: bool) -> torch.Tensor:
        sizes.append(tuple(samples.shape[-2:]))
        if samples.shape[-2] * samples.shape[-1] > 32 * 32:
            raise torch.OutOfMemoryError("test")
        return decode(samples)

    monkeypatch.setattr(tiny.vae.first_stage_model, "decode", short, raising=False)
    (image,) = host.run("VAEDecode", samples={"samples": torch.zeros(1, 128, 40, 40)}, vae=tiny.vae)
    assert sizes[:3] == 3 * [(40, 40)] and (32, 32) in sizes and len(sizes) > 8
    assert image.shape == (1, 640, 640, 3)


def test_an_older_comfyui_names_its_error(host, management, monkeypatch):
    is_shortage = host.module("nodes.host.recovery").is_shortage
    monkeypatch.delattr(management, "is_oom")
    assert is_shortage(torch.OutOfMemoryError("test")) and not is_shortage(RuntimeError("test"))
    again = host.module("lens_core.memory.recovery").OutOfMemory("test")
    assert not is_shortage(again)


def test_stock_clip_nodes_recover(host, tiny, short, management):
    shortage = short("encode", lambda call: call == 7)
    (positive,) = host.run("CLIPTextEncode", clip=tiny.clip, text="a red circle")
    assert torch.equal(positive[0][0], tiny.positive[0][0])
    assert shortage.calls > 24 and not shortage.leaked


def test_dense_experts_cannot_be_streamed(host, management, monkeypatch):
    """All the same the other models make room, and the error names the experts."""
    FakeGpu(1 << 40).install(monkeypatch)
    (clip,) = host.run(
        "LensEncoderLoader",
        encoder_name="gpt_oss_tiny_mxfp4.safetensors",
        experts="bfloat16",
        feature_cache=False,
    )
    layer = host.module("lens_core.encoder.gpt_oss").GptOssLayer
    shortage = Shortage(lambda call: call in (3, 101))
    monkeypatch.setattr(layer, "forward", before(layer.forward, shortage))
    host.run("CLIPTextEncode", clip=clip, text="x")
    shortage.fails = always
    with pytest.raises(torch.OutOfMemoryError, match="experts 'packed', with placement 'stream'"):
        host.run("CLIPTextEncode", clip=clip, text="y")
