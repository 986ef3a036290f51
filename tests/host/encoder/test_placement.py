"""The placements, dense experts and patches of an encoder on a GPU of chosen size."""

from __future__ import annotations

import pytest
import torch

from tests.compare import relative_l2
from tests.host.encoder.conftest import LAYERS, encode
from tests.host.fake_gpu import CPU, GPU, resident_bytes


@pytest.mark.parametrize("budget", [0, 1e6, 1e32])
def test_stream_makes_no_layer_resident(load, gpu, encodes_right, budget):
    patcher = load(placement="stream").patcher
    assert patcher.partially_load(GPU, budget) == 0
    patcher.load(GPU, full_load=True)
    patcher.patch_model(GPU)
    assert patcher.loaded_size() == resident_bytes(patcher) == 0
    encodes_right(patcher)
    assert resident_bytes(patcher) == 0


@pytest.mark.parametrize("budget", [-1e9, 0, 1, 1e32])
def test_gpu_ignores_the_budget(load, gpu, encodes_right, budget):
    patcher = load(placement="gpu").patcher
    for _ in range(2):
        patcher.partially_load(GPU, budget)
        assert patcher.loaded_size() == resident_bytes(patcher) == patcher.model_size()
    encodes_right(patcher)


def test_gpu_still_gives_way_to_other_models(load, gpu, management):
    """It is the next prompt that may not be short of layers, not ComfyUI of memory."""
    clip = load(placement="gpu")
    gpu.encoders.append(clip.patcher)
    encode(clip)
    management.free_memory(1e30, GPU)
    assert resident_bytes(clip.patcher) == 0
    encode(clip)
    assert resident_bytes(clip.patcher) == clip.patcher.model_size()


@pytest.mark.parametrize(
    "placement, device", [("auto", CPU), ("gpu", GPU), ("stream", GPU), ("cpu", CPU)], ids=str
)
def test_placement_names_the_device(load, gpu, management, monkeypatch, placement, device):
    """With --lowvram ComfyUI puts text encoders on the CPU; who names the GPU gets it all the same."""
    monkeypatch.setattr(management, "text_encoder_device", lambda: CPU)
    patcher = load(placement=placement).patcher
    assert patcher.load_device == device and patcher.offload_device == CPU


def test_cpu_needs_no_gpu(load, gpu, tiny):
    clip = load(placement="cpu")
    gpu.encoders.append(clip.patcher)
    gpu.capacity = 0
    assert torch.equal(encode(clip), tiny.positive[0][0])
    assert resident_bytes(clip.patcher) == 0


def test_dense_experts_give_the_same(load, gpu, tiny):
    """In fp32 here; unpacking a bank is exact, and only the order of sums may differ."""
    clip = load(experts="bfloat16")
    gpu.encoders.append(clip.patcher)
    assert relative_l2(encode(clip), tiny.positive[0][0]) < 1e-6
    # In fp32 the biases are a little larger than counted; on a GPU dense experts are bf16 like them.
    assert resident_bytes(clip.patcher) == pytest.approx(clip.patcher.model_size(), rel=0.005)
    assert clip.patcher.model_size() > 2 * load().patcher.model_size()


@pytest.mark.parametrize("placed_before", [False, True])
def test_dense_experts_need_room_for_all(load, gpu, management, placed_before, tiny):
    """The sentence, and nothing left on the GPU that ComfyUI does not count."""
    clip = load(experts="bfloat16")
    gpu.encoders.append(clip.patcher)
    if placed_before:
        encode(clip)
        management.free_memory(gpu.free(GPU) + 1, GPU)
        assert 0 < resident_bytes(clip.patcher) < clip.patcher.model_size()
    gpu.capacity = 0.9 * clip.patcher.model_size()
    with pytest.raises(Exception, match=r"GB of GPU memory and .* Set LensEncoderLoader's experts") as caught:
        encode(clip)
    assert type(caught.value).__name__ == "SettingError"
    assert resident_bytes(clip.patcher) == clip.patcher.loaded_size() == 0
    assert not management.current_loaded_models
    gpu.capacity = 1 << 40
    assert relative_l2(encode(clip), tiny.positive[0][0]) < 1e-6


def test_dense_experts_are_not_taken_away_in_part(load, gpu, management):
    """With all resident and the GPU full, the budget is negative; a part could not encode."""
    clip = load(experts="bfloat16", placement="gpu")
    gpu.encoders.append(clip.patcher)
    encode(clip)
    gpu.capacity = before = resident_bytes(clip.patcher)
    encode(clip)
    assert resident_bytes(clip.patcher) == before and clip.patcher.loaded_size() == clip.patcher.model_size()


@pytest.mark.parametrize("placement", ["stream", "cpu"])
def test_dense_experts_only_on_a_gpu(load, gpu, placement):
    with pytest.raises(Exception, match=f"'{placement}'.*experts to 'packed'") as caught:
        load(experts="bfloat16", placement=placement)
    assert type(caught.value).__name__ == "SettingError"


def test_dense_experts_without_a_gpu(load, management):
    with pytest.raises(Exception, match=r"'auto' \(here: cpu\).*experts to 'packed'"):
        load(experts="bfloat16")


def test_patches_are_refused_with_one_warning(load, caplog):
    """A LoRA brings all its weights at once, a merge one a call; a hook would write into the masters."""
    import comfy.hooks

    patcher = load().patcher.clone()
    patcher.model.text.read()
    names = [name for name in patcher.model.state_dict() if name.endswith("q_proj.weight")]
    patches = {name: ("diff", (torch.ones(1, 1),)) for name in names}
    before = {name: tensor.clone() for name, tensor in patcher.model.state_dict().items() if name in names}
    hook = comfy.hooks.WeightHook()
    assert patcher.add_patches({}) == [] and not caplog.text
    for name in names:
        assert patcher.add_patches({name: patches[name]}) == []
    assert patcher.add_hook_patches(hook, patches) == []
    patcher.patch_hooks(comfy.hooks.HookGroup())
    assert not patcher.patches and not patcher.hook_patches and not patcher.hook_backup
    assert caplog.text.count("are ignored: its weights are packed") == 1 and len(names) == LAYERS
    for name, tensor in before.items():
        assert torch.equal(patcher.model.state_dict()[name], tensor)
