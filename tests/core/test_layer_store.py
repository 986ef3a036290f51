"""Resident and streamed layers. torch.device("cpu:0") stands for a GPU: it is not equal to "cpu", where the
masters lie, so layers are copied there as they would be, only in line."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from lens_core.memory import LayerStore
from lens_core.memory import layers as layers_module
from lens_core.memory.flat import Layout, assign

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cpu:0"), torch.device("cpu:1")


class Layer(nn.Module):
    """Some of each: a matrix of 40 bytes more than 256, one number, odd bytes, nothing."""

    def __init__(self, value: int, device: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 37), float(value), dtype=torch.bfloat16, device=device))
        self.register_buffer("scale", torch.full((), value + 0.5, device=device))
        self.register_buffer("codes", torch.full((3, 7, 5), value, dtype=torch.uint8, device=device))
        self.register_buffer("nothing", torch.empty(0, 3, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x + self.weight.float().sum() + self.scale + self.codes.sum()


# 296, 4, 105 and 0 bytes, each rounded up to 256.
SIZE = 512 + 256 + 256


def skeleton() -> nn.Module:
    return Layer(0, "meta")


def store_of(count: int = 5, **options) -> LayerStore:
    with torch.inference_mode(False):
        masters = [Layer(number + 1).requires_grad_(False) for number in range(count)]
    return LayerStore(masters, skeleton, **options)


def snapshot(store: LayerStore) -> list[dict[str, Tensor]]:
    return [{name: t.clone() for name, t in layer.state_dict().items()} for layer in store.masters]


def unchanged(store: LayerStore, before: list[dict[str, Tensor]]) -> bool:
    return all(
        torch.equal(tensor, old[name]) and tensor.device == CPU
        for layer, old in zip(store.masters, before, strict=True)
        for name, tensor in layer.state_dict().items()
    )


def run(layers, x: float = 1.0) -> Tensor:
    y = torch.tensor(x)
    for layer in layers:
        y = layer(y)
    return y


def resident(store: LayerStore) -> list[int]:
    return sorted(store._resident)


def test_layout_of_odd_tensors():
    layout = Layout.of(Layer(1))
    assert [(name, offset) for name, offset, *_ in layout.entries] == [
        ("codes", 0),
        ("nothing", 256),
        ("scale", 256),
        ("weight", 512),
    ]
    assert layout.size == SIZE


def test_views_lie_in_the_flat_memory_and_have_their_dtypes():
    layout, flat = Layout.of(Layer(1)), torch.zeros(SIZE + 100, dtype=torch.uint8)
    views = layout.views(flat)
    for name, tensor in Layer(7).state_dict().items():
        assert views[name].shape == tensor.shape and views[name].dtype == tensor.dtype
        assert views[name].untyped_storage().data_ptr() == flat.data_ptr()
        views[name].copy_(tensor)
    layer = assign(skeleton(), views)
    assert layer(torch.tensor(0.0)) == Layer(7)(torch.tensor(0.0))
    assert not layer.training and not any(p.requires_grad for p in layer.parameters())
    assert (flat[SIZE:] == 0).all()


def test_total_loaded_and_buffers_as_layers_become_resident():
    store = store_of(5)
    assert (store.total, store.loaded, store.buffers) == (5 * SIZE, 0, 2 * SIZE)
    for budget, count in ((0, 0), (2 * SIZE, 0), (3 * SIZE - 1, 0), (3 * SIZE, 1), (5 * SIZE - 1, 2)):
        store.unload()
        assert store.load(GPU, budget) == count * SIZE == store.loaded
        assert resident(store) == list(range(count))
        assert store.buffers == 2 * SIZE
        # What was asked for is never exceeded, buffers included.
        assert store.loaded + store.buffers <= max(budget, 2 * SIZE)
    assert store.load(GPU, 5 * SIZE) == 3 * SIZE
    assert (store.loaded, store.buffers) == (store.total, 0)


def test_one_layer_left_needs_one_buffer():
    store = store_of(3)
    store.load(GPU, 3 * SIZE)
    store.unload(1)
    assert store.buffers == SIZE
    assert run(store.on(GPU)) == run(store.masters)


@pytest.mark.parametrize(("enough", "left"), [(0, 5), (1, 4), (SIZE, 4), (SIZE + 1, 3), (1e30, 0)])
def test_unloading_takes_the_last_layers_until_it_is_enough(enough: float, left: int):
    store = store_of(5)
    store.load(GPU, float("inf"))
    assert store.unload(enough) == (5 - left) * SIZE
    assert resident(store) == list(range(left)) and store.loaded == left * SIZE


def test_a_smaller_budget_later_takes_nothing_away():
    store = store_of(5)
    store.load(GPU, float("inf"))
    assert store.load(GPU, 0) == 0
    assert store.loaded == store.total


def test_loading_goes_on_where_it_was():
    """Layers that are there are not copied again."""
    store = store_of(5)
    store.load(GPU, 4 * SIZE)
    first = dict(store._resident)
    assert store.load(GPU, float("inf")) == 3 * SIZE
    assert all(store._resident[index] is layer for index, layer in first.items())


@pytest.mark.parametrize("budget", [0, 3, 4, 99], ids=lambda layers: f"budget of {layers} layers")
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_run_gives_what_the_masters_give(count: int, budget: int):
    store = store_of(count)
    before = snapshot(store)
    store.load(GPU, budget * SIZE)
    kept = store.loaded
    for _ in range(2):
        assert run(store.on(GPU)) == run(store.masters)
    assert store.loaded == kept
    assert unchanged(store, before)


def test_on_the_masters_device_the_masters_run():
    store = store_of(3)
    store.load(GPU, float("inf"))
    assert list(store.on(CPU)) == store.masters
    assert store.loaded == store.total, "a run on the CPU takes nothing off the GPU"


def test_a_run_on_another_device_lets_go_of_the_first():
    store = store_of(3)
    store.load(GPU, float("inf"))
    layers = store.on(torch.device("cpu", 1))
    assert store.loaded == 0 and store.device == OTHER
    assert run(layers) == run(store.masters)
    store.load(GPU, SIZE * 3)
    assert store.device == GPU and store.loaded == store.total


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    store = store_of(3)
    store.load(GPU, float("inf"))
    store.device = torch.device("cuda:1")  # as if they lay there
    store.on(torch.device("cuda"))
    assert store.loaded == store.total
    store.on(torch.device("cuda:0"))
    assert store.loaded == 0


def test_page_locked_copies_are_made_once_and_used(monkeypatch: pytest.MonkeyPatch):
    """As many as RAM allows beside a reserve. Here ordinary memory stands for the page-locked."""
    store, made = store_of(4), []
    room = [10 << 30, 10 << 30, 0]
    monkeypatch.setattr(layers_module, "available_ram", lambda: room[min(len(made), 2)])
    monkeypatch.setattr(layers_module, "pinned", lambda size: made.append(size) or torch.empty(size).byte())
    for _ in range(2):
        for index in range(4):
            store.lock(index)
    assert made == [SIZE, SIZE] and sorted(store._locked) == [0, 1]
    store._locked[1][:8] = 99  # told apart from the master
    copies = [torch.zeros(SIZE, dtype=torch.uint8) for _ in range(2)]
    for index, copy in enumerate(copies):
        store.copy(index, copy)
    views = store.layouts[0].views(copies[0])
    assert all(torch.equal(views[name], tensor) for name, tensor in store.masters[0].state_dict().items())
    assert copies[1][0] == 99
    assert run(store.on(GPU), 0.0) != run(store.masters, 0.0)
    store.load(GPU, float("inf"))
    assert store._locked == {}, "a resident layer needs no copy to stream from"


def test_a_layer_that_comes_back_is_page_locked(monkeypatch: pytest.MonkeyPatch):
    """Not one that comes for the first time, and not where the copy is no faster for it."""
    made = []
    monkeypatch.setattr(layers_module, "available_ram", lambda: 1 << 40)
    monkeypatch.setattr(
        layers_module, "pinned", lambda size: made.append(size) or torch.empty(size, dtype=torch.uint8)
    )
    store = store_of(3)
    want = run(store.on(CPU))
    for _ in range(2):
        store.load(GPU, 1e9)
        store.unload()
    assert made == []
    monkeypatch.setattr(layers_module, "_copies_faster_locked", lambda device: True)
    monkeypatch.setattr(layers_module, "LOCKED_A_LOAD", 2 * SIZE)
    for locked in ([0, 1], [0, 1, 2], [0, 1, 2]):
        store.load(GPU, 1e9)
        assert torch.equal(run(store.on(GPU)), want)
        assert sorted(store._locked) == locked
        store.unload()
    assert made == [SIZE] * 3


@pytest.mark.parametrize("refused_by", ["RAM", "the system"])
def test_a_lack_of_page_locked_memory_is_said_once(
    refused_by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(layers_module, "available_ram", lambda: 0 if refused_by == "RAM" else 1 << 40)
    monkeypatch.setattr(layers_module, "pinned", lambda _: None)
    store = store_of(4)
    with caplog.at_level(logging.INFO):
        for index in (1, 2, 3, 1, 2, 3):
            store.lock(index)
    assert caplog.messages == ["RAM is short: layers are streamed from ordinary memory, more slowly."]


@pytest.mark.parametrize(("count", "buffers"), [(5, 2), (1, 1)])
def test_a_streamed_run_takes_two_layers_memory_at_most(
    count: int, buffers: int, monkeypatch: pytest.MonkeyPatch
):
    store, made = store_of(count), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    assert run(store.on(GPU)) == run(store.masters)
    flats = [len(flat) for flat in made if flat.dtype == torch.uint8 and flat.ndim == 1]
    assert flats == [SIZE] * buffers and store.buffers == buffers * SIZE


def test_the_next_layer_is_copied_while_one_runs(monkeypatch: pytest.MonkeyPatch):
    """Into the other buffer: what runs is not overwritten."""
    store, copied = store_of(4), []
    copy = store.copy
    monkeypatch.setattr(store, "copy", lambda index, flat: copied.append(index) or copy(index, flat))
    seen = []
    for layer in store.on(GPU):
        seen.append((layer.scale.item(), list(copied)))
    assert seen == [(1.5, [0, 1]), (2.5, [0, 1, 2]), (3.5, [0, 1, 2, 3]), (4.5, [0, 1, 2, 3])]


def test_a_run_that_ends_early_leaves_the_store_as_it_was():
    """The last captured layer may come before the last one."""
    store = store_of(5)
    store.load(GPU, 3 * SIZE)
    before = store.loaded
    layers = store.on(GPU)
    assert run(islice(layers, 2)) == run(store.masters[:2])
    layers.close()
    assert store.loaded == before
    assert run(store.on(GPU)) == run(store.masters)


def test_two_runs_at_once_do_not_share_buffers():
    store = store_of(4)
    values = [torch.tensor(1.0), torch.tensor(2.0)]
    for pair in zip(store.on(GPU), store.on(GPU), strict=True):
        values = [layer(value) for layer, value in zip(pair, values, strict=True)]
    assert values == [run(store.masters, 1.0), run(store.masters, 2.0)]


def test_cancelling_a_load_keeps_what_is_there():
    store, calls = store_of(4), []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        store.load(GPU, float("inf"), stop)
    assert calls == [(1, 4), (2, 4)]
    assert resident(store) == [0, 1] and store.loaded == 2 * SIZE
    assert run(store.on(GPU)) == run(store.masters)
    assert store.load(GPU, float("inf")) == 2 * SIZE


def test_layers_of_different_sizes():
    """Buffers are as large as the largest streamed layer, and smaller ones fit in."""

    class Sized(nn.Module):
        def __init__(self, size: int, device: str = "cpu") -> None:
            super().__init__()
            self.register_buffer("values", torch.arange(size, dtype=torch.float32, device=device))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.values.sum()

    class Shell(Sized):
        def load_state_dict(self, tensors: dict[str, Tensor], assign: bool = False) -> None:
            self.values = tensors["values"]

    store = LayerStore([Sized(size) for size in (64, 640, 128, 64, 640, 640)], lambda: Shell(0, "meta"))
    assert store.sizes == [256, 2560, 512, 256, 2560, 2560]
    assert (store.total, store.buffers) == (8704, 5120)
    assert store.load(GPU, 8703) == 256 + 2560 + 512
    assert run(store.on(GPU)) == run(store.masters)
    store.unload()
    for index in (1, 4, 5):
        store._resident[index] = store._placed(index, GPU)
    assert store.buffers == 2 * 512
    assert run(store.on(GPU)) == run(store.masters)


def doubled(layer: nn.Module) -> nn.Module:
    """Another form of a layer, in memory of its own: twice the bytes."""
    made = Layer(0)
    made.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
    made.scale, made.codes = layer.scale.clone(), layer.codes.clone()
    return made


def test_converted_layers_count_as_what_they_became():
    store = store_of(4, convert=doubled, converted_size=2 * SIZE)
    before = snapshot(store)
    assert store.total == 8 * SIZE
    assert store.load(GPU, 8 * SIZE) == 8 * SIZE
    assert all(layer.weight.dtype == torch.float32 for layer in store.on(GPU))
    assert run(store.on(GPU)) == run(store.masters)
    assert store.unload(3 * SIZE) == 4 * SIZE
    assert unchanged(store, before)


def test_converted_layers_are_not_streamed():
    store = store_of(4, convert=doubled, converted_size=2 * SIZE)
    store.load(GPU, 8 * SIZE - 1)
    with pytest.raises(RuntimeError, match="cannot be streamed"):
        list(store.on(GPU))


def test_the_packed_layer_goes_once_it_is_converted():
    storages = []

    def convert(layer: nn.Module) -> nn.Module:
        storages.append(weakref.ref(layer.weight.untyped_storage()))
        return doubled(layer)

    store = store_of(3, convert=convert, converted_size=2 * SIZE)
    without_collector(lambda: store.load(GPU, float("inf")))
    assert [storage() for storage in storages] == [None] * 3


@pytest.mark.parametrize("budget", [0, 3 * SIZE, float("inf")])
def test_a_store_goes_without_the_collector(budget: float):
    """With it, all that it held: 10 GB must not wait for a cycle to be found."""

    def made_and_dropped() -> list[weakref.ref]:
        store = store_of(4)
        store.load(GPU, budget)
        run(store.on(GPU))
        return [weakref.ref(x) for x in (store, *store.masters, *store._resident.values())]

    assert not any(ref() for ref in without_collector(made_and_dropped))


def without_collector(action: Callable):
    gc.collect()
    gc.disable()
    try:
        return action()
    finally:
        gc.enable()
