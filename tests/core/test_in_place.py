"""Layers that stay the same objects. torch.device("cpu:0") stands for a GPU: see test_layer_store."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lens_core.memory.in_place import InPlaceStore

GPU = torch.device("cpu:0")


@pytest.fixture
def layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(16, 16).requires_grad_(False) for _ in range(5)]


@pytest.fixture
def store(layers: list[nn.Linear]) -> InPlaceStore:
    return InPlaceStore([[layer] for layer in layers])


def home(layers: list[nn.Linear]) -> list[Tensor]:
    return [layer.weight for layer in layers]


def run(store: InPlaceStore, layers: list[nn.Linear], indices=range(5)) -> Tensor:
    x = torch.ones(1, 16)
    for index in store.visits(GPU, indices):
        x = layers[index](x)
    return x


@pytest.mark.parametrize("resident", range(6))
def test_the_same_result_however_many_are_resident(store, layers, resident: int):
    want = torch.ones(1, 16)
    for layer in layers:
        want = layer(want)
    store.keep(GPU, resident)
    assert store.whole == (resident == 5)
    for _ in range(2):
        assert torch.equal(run(store, layers), want)


def test_parts_of_the_layers(store, layers):
    store.keep(GPU, 1)
    want = layers[3](layers[2](torch.ones(1, 16)))
    assert torch.equal(run(store, layers, range(2, 4)), want)


def test_tensors_are_exchanged_and_come_back(store, layers):
    before = home(layers)
    store.keep(GPU, 2)
    assert [a is b for a, b in zip(home(layers), before, strict=True)] == [False, False, True, True, True]
    for index in store.visits(GPU, range(5)):
        assert layers[index].weight is not before[index]
        assert isinstance(layers[index].weight, nn.Parameter)
        others = [other for other in range(2, 5) if other != index]
        assert all(layers[other].weight is before[other] for other in others)
    store.unload()
    assert all(a is b for a, b in zip(home(layers), before, strict=True))
    assert store.loaded == 0


def test_a_run_that_ends_early_leaves_nothing_behind(store, layers):
    before = home(layers)
    visits = store.visits(GPU, range(5))
    next(visits), next(visits)
    visits.close()
    del visits
    assert all(a is b for a, b in zip(home(layers), before, strict=True))


def test_fewer_are_kept_than_before(store, layers):
    before = home(layers)
    store.keep(GPU, 4)
    at_four = store.loaded
    store.keep(GPU, 1)
    assert store.loaded == at_four // 4
    assert [a is b for a, b in zip(home(layers), before, strict=True)] == [False, True, True, True, True]


def test_buffers_and_packed_tensors_too():
    layer = nn.Module()
    layer.register_buffer("codes", torch.arange(7, dtype=torch.uint8))
    layer.register_parameter("bias", None)
    store = InPlaceStore([[layer]])
    codes = layer.codes
    store.keep(GPU, 1)
    assert layer.codes is not codes and torch.equal(layer.codes, codes)
    assert not isinstance(layer.codes, nn.Parameter)
