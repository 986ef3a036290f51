"""The encoder's patcher: whole layers on a GPU, counted truly, let go at once, and never left behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.host.encoder.conftest import LAYERS, encode, layer_size
from tests.host.fake_gpu import CPU, GPU, resident_bytes


def test_sizes_are_honest(patcher, encodes_right):
    """With growing budgets more and more layers are resident; what is said is what is held."""
    size, held = layer_size(patcher), []
    assert patcher.loaded_size() == resident_bytes(patcher) == 0
    for layers in (0.5, 2.5, 7, 7, 20, 25.9, 26.1):
        before = patcher.loaded_size()
        added = patcher.partially_load(GPU, layers * size - before)
        assert patcher.loaded_size() == before + added == resident_bytes(patcher)
        # Two buffers for the streamed layers come out of the budget, unless all are resident.
        assert patcher.loaded_size() + 2 * size <= layers * size or not added or layers >= LAYERS
        held.append(patcher.loaded_size() // size)
        encodes_right(patcher)
    assert held == [0, 0, 5, 5, 18, 24, 24]
    assert patcher.loaded_size() == patcher.model_size() and patcher.current_loaded_device() == GPU


def test_negative_budget_lets_layers_go(patcher, encodes_right):
    size = layer_size(patcher)
    patcher.partially_load(GPU, 1e32)
    assert patcher.partially_load(GPU, -2.5 * size) == -3 * size
    assert patcher.loaded_size() == resident_bytes(patcher) == 21 * size
    encodes_right(patcher)
    assert patcher.partially_load(GPU, -1e32) == -21 * size
    assert patcher.loaded_size() == resident_bytes(patcher) == 0
    encodes_right(patcher)


@pytest.mark.parametrize("layers, freed", [(0, 0), (0.01, 1), (1, 1), (3.2, 4), (24, 24), (99, 24)])
def test_partial_unload_frees_whole_layers(patcher, encodes_right, layers, freed):
    size = layer_size(patcher)
    patcher.partially_load(GPU, 1e32)
    assert patcher.partially_unload(CPU, layers * size) == freed * size
    assert patcher.loaded_size() == resident_bytes(patcher) == (LAYERS - freed) * size
    encodes_right(patcher)


def test_unloading_copies_nothing_back(patcher):
    """The master copies are where they were: the same memory, whatever was loaded."""
    patcher.model.text.read()
    before = {name: tensor.data_ptr() for name, tensor in patcher.model.state_dict().items()}
    patcher.partially_load(GPU, 1e32)
    layers = [weakref.ref(layer) for layer in patcher.model.text.layers._resident.values()]
    patcher.detach()
    assert all(layer() is None for layer in layers) and len(layers) == LAYERS
    assert patcher.loaded_size() == 0 and patcher.current_loaded_device() == CPU
    assert {name: tensor.data_ptr() for name, tensor in patcher.model.state_dict().items()} == before


def test_detach_and_load_again(patcher, encodes_right):
    for _ in range(2):
        patcher.patch_model(GPU)
        assert patcher.loaded_size() == resident_bytes(patcher) == patcher.model_size()
        encodes_right(patcher)
        patcher.detach()
        assert patcher.loaded_size() == resident_bytes(patcher) == 0
    patcher.patch_model(GPU, lowvram_model_memory=5 * layer_size(patcher))
    assert patcher.loaded_size() == 3 * layer_size(patcher)
    patcher.detach(unpatch_all=False)
    assert patcher.loaded_size() == 3 * layer_size(patcher), "ComfyUI only hands it to a clone"


def test_moving_to_the_cpu_leaves_the_gpu(patcher):
    """SelectCLIPDevice shares the model between a GPU and the CPU."""
    patcher.partially_load(GPU, 1e32)
    patcher.partially_load(CPU, 1e32)
    assert resident_bytes(patcher) == 0 and patcher.loaded_size() == patcher.model_size()
    for budget in (0, -1e6):
        patcher.partially_load(CPU, 1e32)
        patcher.partially_load(GPU, budget)
        assert resident_bytes(patcher) == patcher.loaded_size() == 0


# How many layers the manager leaves room for, beside what encoding itself asks for -> how many it gets.
@pytest.mark.parametrize("room, resident", [(0, 0), (8, 6), (23.9, 21), (24, 24), (40, 24)])
def test_memory_manager_fills_what_is_free(load, gpu, management, tiny, room, resident):
    clip = load()
    size = layer_size(clip.patcher)
    gpu.encoders.append(clip.patcher)
    gpu.capacity = clip.cond_stage_model.memory_estimation_function(None) + room * size
    for _ in range(2):
        assert torch.equal(encode(clip), tiny.positive[0][0])
        assert resident_bytes(clip.patcher) == clip.patcher.loaded_size() == resident * size
        [loaded] = management.current_loaded_models
        assert loaded.model is clip.patcher and loaded.model_loaded_memory() == resident * size


def test_other_models_take_layers_away(load, gpu, management, tiny):
    """What ComfyUI frees for another model it gets at once, in layers; the next prompt takes them back."""
    clip = load()
    size = layer_size(clip.patcher)
    gpu.encoders.append(clip.patcher)
    gpu.capacity = clip.cond_stage_model.memory_estimation_function(None) + 30 * size
    encode(clip)
    before = gpu.free(GPU)
    management.free_memory(before + 2.5 * size, GPU)
    assert gpu.free(GPU) == before + 3 * size
    assert clip.patcher.loaded_size() == 21 * size and management.loaded_models() == [clip.patcher]
    gpu.taken = 12 * size
    assert torch.equal(encode(clip), tiny.positive[0][0])
    assert clip.patcher.loaded_size() == resident_bytes(clip.patcher) < 21 * size
    gpu.taken = 0
    assert torch.equal(encode(clip), tiny.positive[0][0])
    assert clip.patcher.loaded_size() == 24 * size
    management.free_memory(1e30, GPU)
    assert not management.current_loaded_models and resident_bytes(clip.patcher) == 0


def test_two_encoders_share_a_gpu(load, gpu, tiny):
    """Room for one: each prompt pushes the other encoder's layers out."""
    first, second = load(), load(encoder_name="Lens-tiny")
    size = layer_size(first.patcher)
    gpu.encoders += [first.patcher, second.patcher]
    gpu.capacity = first.cond_stage_model.memory_estimation_function(None) + 28 * size
    for clip, other in ((first, second), (second, first), (first, second)):
        assert torch.equal(encode(clip), tiny.positive[0][0])
        assert resident_bytes(clip.patcher) == 24 * size
        assert resident_bytes(other.patcher) == other.patcher.loaded_size() <= 4 * size


class Cancel:
    """A progress hook that presses Cancel once a stage has reported ``after`` times."""

    def __init__(self, management, patcher, stage: str, after: int) -> None:
        self.management, self.text = management, patcher.model.text
        self.stage, self.after, self.seen = stage, after, 0
        self.encoding = False
        run = self.text.encode

        def encode(*arguments, **settings):
            self.encoding = True
            return run(*arguments, **settings)

        self.text.encode = encode

    def __call__(self, done, total, preview, node_id=None) -> None:
        now = "reading" if not self.text.is_read else "encoding" if self.encoding else "loading"
        self.seen += now == self.stage
        if self.seen == self.after and now == self.stage:
            self.management.interrupt_current_processing(True)


@pytest.mark.parametrize("after", [1, 10, 23])
@pytest.mark.parametrize("stage", ["reading", "loading", "encoding"])
@pytest.mark.parametrize("room", [12, 40], ids=["partly", "whole"])
def test_cancel_leaves_nothing_behind(load, gpu, management, tiny, progress, stage, after, room):
    """What stays on the GPU is what ComfyUI counts; the next prompt works."""
    import comfy.utils

    if stage == "loading" and room == 12:
        after = min(after, 9)  # ten layers fit; at the last one it is too late
    clip = load()
    size = layer_size(clip.patcher)
    gpu.encoders.append(clip.patcher)
    gpu.capacity = clip.cond_stage_model.memory_estimation_function(None) + room * size
    cancel = Cancel(management, clip.patcher, stage, after)
    comfy.utils.set_progress_bar_global_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        encode(clip)
    assert cancel.seen == after, "it went on"
    counted = sum(m.model_loaded_memory() for m in management.current_loaded_models)
    assert resident_bytes(clip.patcher) == clip.patcher.loaded_size() == counted
    assert (counted > 0) == (stage == "encoding")
    assert clip.cond_stage_model.text.is_read == (stage != "reading")
    assert torch.equal(encode(clip), tiny.positive[0][0])
    assert resident_bytes(clip.patcher) == (24 if room == 40 else 10) * size


def test_failure_while_loading_leaves_nothing_behind(load, gpu, management, monkeypatch, tiny):
    """Out of memory at the sixth layer, though ComfyUI's count had room for all: all layers are streamed."""
    clip = load()
    gpu.encoders.append(clip.patcher)
    layers = clip.cond_stage_model.text.layers
    place = type(layers)._placed

    def short(self, index, device):
        if index == 5:
            raise torch.OutOfMemoryError("no room")
        return place(self, index, device)

    with monkeypatch.context() as patch:
        patch.setattr(type(layers), "_placed", short)
        assert torch.equal(encode(clip), tiny.positive[0][0])
        assert resident_bytes(clip.patcher) == clip.patcher.loaded_size() == 0
    assert torch.equal(encode(clip), tiny.positive[0][0])
    assert resident_bytes(clip.patcher) == clip.patcher.loaded_size() == clip.patcher.model_size()


def test_clones_share_the_model_and_its_place(load, gpu, management, tiny):
    clip = load()
    one, two = clip.clone(), clip.clone().clone()
    gpu.encoders.append(clip.patcher)
    for other in (one, two):
        assert type(other) is type(clip) and type(other.patcher) is type(clip.patcher)
        assert other.cond_stage_model is clip.cond_stage_model and other.patcher is not clip.patcher
        assert other.patcher.is_clone(clip.patcher)
    for current in (one, two, clip):
        assert torch.equal(encode(current), tiny.positive[0][0])
        assert management.loaded_models() == [current.patcher]
        assert resident_bytes(clip.patcher) == current.patcher.loaded_size() == clip.patcher.model_size()
    size = layer_size(clip.patcher)
    one.patcher.partially_unload(CPU, size)
    assert two.patcher.loaded_size() == clip.patcher.loaded_size() == 23 * size


def test_deleted_clone_hands_the_model_back(load, gpu, management):
    """ComfyUI keeps counting the layers while an older clone lives."""
    clip = load()
    clone = clip.clone()
    encode(clone)
    del clone
    assert management.loaded_models() == [clip.patcher]
    assert management.current_loaded_models[0].model_loaded_memory() == clip.patcher.model_size()


def test_deep_clone_has_a_place_of_its_own(load, gpu, encodes_right):
    """ComfyUI makes one for each further GPU."""
    patcher = load(placement="gpu").patcher
    deep = patcher.deepclone_multigpu(new_load_device=GPU)
    assert type(deep) is type(patcher) and deep.model is not patcher.model
    assert deep.model.placement == "gpu" and deep.load_device == GPU and deep.is_clip
    deep.partially_load(GPU, 1e32)
    assert deep.loaded_size() == deep.model_size() and patcher.loaded_size() == 0
    encodes_right(deep)


def test_clip_on_another_gpu(load, gpu, tiny):
    """SelectCLIPDevice exchanges a CLIP's patcher alone: the module that encodes must be the new one's."""
    clip = load().clone()
    clip.patcher = clip.patcher.deepclone_multigpu(new_load_device=GPU)
    assert clip.cond_stage_model is clip.patcher.model is clip.clone().cond_stage_model
    assert torch.equal(encode(clip), tiny.positive[0][0])
    assert resident_bytes(clip.patcher) == clip.patcher.model_size()


STATES = {
    "unread": lambda clip: None,
    "partly loaded": lambda clip: clip.patcher.partially_load(GPU, 10 * layer_size(clip.patcher)),
    "encoded": encode,
    "encoded, then partly unloaded": lambda clip: (encode(clip), clip.patcher.partially_unload(CPU, 1)),
}


@pytest.mark.parametrize(
    "experts, state",
    # Dense experts are resident as a whole or not at all.
    [("packed", state) for state in STATES] + [("bfloat16", state) for state in ("unread", "encoded")],
)
def test_deleting_frees_without_the_garbage_collector(load, gpu, management, state, experts):
    gc.collect()
    gc.disable()
    try:
        clip = load(experts=experts)
        STATES[state](clip)
        text = clip.cond_stage_model.text
        masters, resident = list(text.layers.masters), list(text.layers._resident.values())
        assert bool(resident) == (state != "unread")
        kept = [weakref.ref(thing) for thing in (clip.patcher, clip.cond_stage_model, text, text.layers)]
        kept += [weakref.ref(layer) for layer in (*masters, *resident)]
        del clip, text, masters, resident
        assert [thing() for thing in kept] == [None] * len(kept)
        assert not management.current_loaded_models
    finally:
        gc.enable()
