"""What the modulation gives back before a run's first step: what the steps need, of what is there."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lens_core.config import is_modulation
from lens_core.tiny import models
from tests.host.fake_gpu import CPU, GPU, FakeGpu, own_bytes

LINEARS = 2 * models.DENOISER.num_layers
NOISE = torch.zeros(2, 128, 6, 4)


@pytest.fixture
def management(host, tiny):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    yield comfy.model_management
    comfy.model_management.unload_all_models()


@pytest.fixture(params=[0, 2], ids=["copies wait", "copies ahead"])
def gpu(request, management, monkeypatch):
    """ComfyUI keeps room for what it copies ahead in streams, and frees that too."""
    monkeypatch.setattr(management, "NUM_STREAMS", request.param)
    return FakeGpu(1 << 40).install(monkeypatch)


@pytest.fixture
def model(host, gpu):
    return host.run("LensModelLoader", model_name="Lens-tiny", dtype="float32")[0]


def split(model, gpu) -> tuple[float, int]:
    """How many of the modulation's linears are on the GPU, and bytes of all else there."""
    linears, others = 0, 0
    for name, module in model.model.diffusion_model.named_modules():
        if module in gpu.here:
            linears += is_modulation(name)
            others += 0 if is_modulation(name) else own_bytes(module)
    return linears, others


def linear_bytes(model) -> int:
    return own_bytes(model.model.diffusion_model.blocks[0].img_mod[1])


@pytest.fixture
def make_room(host, model, gpu, management, monkeypatch, caplog):
    """Loads MODEL with ``there`` of its modulation's linears, then asks for room for ``missing`` more linears
    than are free; returns what stays and the log."""

    def run(there: int, missing: float):
        one = linear_bytes(model)
        ahead = management.NUM_STREAMS if there < LINEARS else 0
        gpu.capacity = model.model_size() - (LINEARS - there - 0.5 - ahead) * one
        management.load_models_gpu([model])
        loaded = split(model, gpu)
        assert loaded[0] == there
        shapes = []

        def memory_required(shape):
            shapes.append(shape)
            return management.get_free_memory(GPU) + missing * one

        guider = SimpleNamespace(inner_model=SimpleNamespace(memory_required=memory_required))
        caplog.set_level("INFO")
        caplog.clear()
        network = model.model.diffusion_model
        rest = (None, NOISE, torch.zeros(1), None, True)
        host.module("nodes.host.run")._make_room(guider, model, network, rest)
        assert shapes == [list(NOISE.shape)]
        stays = split(model, gpu)
        assert stays[1] == loaded[1], "what the steps need was let go"
        return stays[0], caplog.text

    return run


@pytest.mark.parametrize("missing", [-100, -1, 0])
def test_nothing_is_let_go_where_there_is_room(make_room, missing):
    stays, log = make_room(LINEARS, missing)
    assert stays == LINEARS
    assert "what fits of them stays" in log and "released" not in log


@pytest.mark.parametrize("missing", [0.1, 2.5, 3.5])
def test_as_much_as_is_missing_is_let_go(make_room, management, missing):
    """In whole linears, and those copied ahead."""
    stays, log = make_room(LINEARS, missing)
    assert stays == LINEARS - math.ceil(missing) - min(management.NUM_STREAMS, math.ceil(missing) - 1)
    assert "of them were released" in log


@pytest.mark.parametrize("there", [1, 3, LINEARS])
def test_never_more_than_is_there(make_room, management, there):
    """Steps that would need more than the modulation's memory are ComfyUI's to care for."""
    stays, _ = make_room(there, 100)
    assert stays <= management.NUM_STREAMS


def test_nothing_is_let_go_where_nothing_is(make_room):
    stays, log = make_room(0, 100)
    assert stays == 0
    assert "released" not in log


def test_the_log_has_the_sizes(make_room, model, caplog):
    size, one = model.model_size(), linear_bytes(model)
    stays, _ = make_room(LINEARS, 1.5)
    modulation, released, loaded, whole, device = caplog.records[-1].args
    gone = (LINEARS - stays) * one / 1e9
    assert modulation == pytest.approx(LINEARS * one / 1e9) and whole == size / 1e9 and device == GPU
    assert released == f"{gone:.2f} GB of them were released"
    assert loaded == pytest.approx(size / 1e9 - gone)


def test_what_was_let_go_comes_back_for_the_next_run(model, gpu, draw, management, monkeypatch):
    """Whole runs, of which the second finds more room: the same picture, and the modulation is there."""
    want = draw()["samples"]
    management.unload_all_models()
    one = linear_bytes(model)
    gpu.capacity = model.model_size() + one
    need = 2.5 * one
    # ComfyUI loads for what it thinks is needed; by the time of the steps it is more.
    monkeypatch.setattr(type(model.model), "memory_required", lambda *_, **kwargs: 0 if kwargs else need)
    assert torch.equal(draw(model=model)["samples"], want)
    assert split(model, gpu)[0] < LINEARS
    need = 0
    assert torch.equal(draw(model=model)["samples"], want)
    assert split(model, gpu)[0] == LINEARS


def test_a_cpu_keeps_what_it_has(tiny, draw, management, monkeypatch):
    """Weights that would be moved to where they are, whatever ComfyUI estimates."""
    monkeypatch.setattr(type(tiny.model.model), "memory_required", lambda *_, **kwargs: 0 if kwargs else 1e30)
    draw()
    assert tiny.model.load_device == tiny.model.offload_device == CPU
    assert tiny.model.loaded_size() == tiny.model.model_size() and not tiny.model.model.model_lowvram
