"""When the blocks are recorded, played or launched, and what a recording is valid for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lens_core.config import is_modulation
from lens_core.denoiser import BlockGraphs, DenoiserRun, LensDenoiser
from lens_core.denoiser import graph as module
from lens_core.denoiser.block import Shared, run_blocks
from lens_core.ops import sdpa
from tests.core.graph_cases import Graph, check, inputs, install, runs, settled, shared_with

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIGMA = torch.tensor([0.6])


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Graph, Any]]:
    """Blocks can be recorded; -> the graphs and the pools of their memory."""
    return install(monkeypatch)


def test_on_a_cpu_blocks_are_launched_and_that_is_said_once(
    denoiser: LensDenoiser, caplog: pytest.LogCaptureFixture
):
    module._say_once.cache_clear()
    first, second = BlockGraphs(), BlockGraphs()
    arguments = inputs()
    for graphs in (first, first, first, second):
        check(denoiser, graphs, *arguments)
    assert first.runs == runs(0, 0, 3) and second.runs == runs(0, 0, 1)
    assert caplog.messages == [
        "CUDA graphs are on, but the denoiser runs without them: the model computes on the CPU."
    ]


def on(device: torch.device, requires_grad: bool = False) -> Any:
    return SimpleNamespace(device=device, requires_grad=requires_grad)


CHOICE = "an attention of another's choice, or a mask, may change from step to step"


@pytest.mark.parametrize(
    ("weights", "streams", "changed", "reason"),
    [
        ([on(CUDA)], [on(CUDA), on(CUDA)], {}, None),
        ([on(CPU)], [on(CPU)], {}, "the model computes on the CPU"),
        ([on(CUDA)], [on(torch.device("mps"))], {}, "the model computes on the MPS"),
        ([on(CUDA)], [on(CUDA, True), on(CUDA)], {}, "gradients are asked for"),
        ([on(CUDA)], [on(CUDA), on(CUDA, True)], {}, "gradients are asked for"),
        ([on(CUDA), on(CUDA, True)], [on(CUDA)], {}, "gradients are asked for"),
        ([on(CUDA)], [on(CUDA)], {"attention": sdpa}, CHOICE),
        ([on(CUDA)], [on(CUDA)], {"mask": torch.zeros(1)}, CHOICE),
        ([on(CUDA), on(CPU)], [on(CUDA)], {}, "not all of its weights are on the GPU"),
    ],
)
def test_why_not(weights: list, streams: list, changed: dict[str, Any], reason: str | None):
    with torch.inference_mode(False), torch.enable_grad():
        assert module.why_not(weights, streams, shared_with(**changed)) == reason


def test_nothing_is_recorded_where_it_was_never_tried(monkeypatch: pytest.MonkeyPatch):
    """ROCm calls its devices CUDA's too."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert module.why_never(torch.device("cuda")) == "they are for NVIDIA GPUs"


def test_why_not_with_the_asynchronous_allocator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    reason = module.why_not([on(CUDA)], [on(CUDA)], shared_with())
    assert reason == "CUDA's asynchronous allocator is in use"


def test_a_parameter_needs_no_gradient_where_none_are_gathered():
    assert module.why_not([on(CUDA, True)], [on(CUDA)], shared_with()) is None


def test_the_second_of_a_size_is_recorded_and_later_ones_are_played(denoiser: LensDenoiser, recording: list):
    graphs = BlockGraphs()
    counts = [runs(0, 0, 1), runs(1, 1, 1), runs(2, 1, 1), runs(3, 1, 1)]
    for sigma, count in zip((0.9, 0.6, 0.3, 0.1), counts, strict=True):
        check(denoiser, graphs, *inputs(sigma=sigma))
        assert graphs.runs == count
    assert len(recording) == 1


def test_each_size_has_a_recording_of_its_own(denoiser: LensDenoiser, recording: list):
    """Portrait and landscape share one: only the rotation differs, and that is handed over. All compute in
    the same memory, so results are copied out of it."""
    graphs, run = BlockGraphs(), DenoiserRun([0.6])
    sizes = [((5, 3), 4), ((3, 5), 4), ((5, 3), 0), ((5, 3), 9), ((2, 2), 4)]
    results = []
    for _ in range(3):
        for grid, tokens in sizes:
            got = check(denoiser, graphs, *inputs(grid, tokens), run=run)
            results.append((got, got.clone()))
    check(denoiser, graphs, *inputs(batch=2), run=run)
    assert graphs.runs == runs(15 - 4, 4, 5)
    assert [pool for _, pool in recording] == 4 * [1]
    assert all(torch.equal(got, at_once) for got, at_once in results), "a later forward wrote over it"


def test_a_recording_reads_the_inputs_of_its_own(denoiser: LensDenoiser, recording: list):
    """What it was recorded with may be freed; nothing of the caller's is written."""
    graphs, arguments = BlockGraphs(), inputs()
    kept = [x.clone() for x in arguments[:3]]
    streams = [torch.randn(1, tokens, 128) for tokens in (15, 4)]
    run = DenoiserRun([0.6])
    shared = denoiser.shared(streams[0], streams[1], (5, 3), None, None, run)
    tables = run.modulation(denoiser, SIGMA, torch.float32).tables()
    before = [x.clone() for x in (*streams, shared.rotary, *(table for pair in tables for table in pair))]
    for _ in range(3):
        out = graphs.run_blocks(denoiser.blocks, streams, tables, shared)
    now = (*streams, shared.rotary, *(table for pair in tables for table in pair))
    assert all(torch.equal(x, was) for x, was in zip(now, before, strict=True))
    (((_, own, own_tables, own_shared), memory),) = recording[0][0].work
    given = {x.data_ptr() for x in now}
    used = (*own, own_shared.rotary, *(table for pair in own_tables for table in pair))
    assert not given & {x.data_ptr() for x in used}
    assert {x.data_ptr() for x in memory}.isdisjoint(x.data_ptr() for x in out)
    assert all(torch.equal(x, was) for x, was in zip(arguments[:3], kept, strict=True))


def test_parts_of_the_blocks_have_recordings_of_their_own(denoiser: LensDenoiser, recording: list):
    """As a step cache asks for them: the first block always, the others not in every step."""
    graphs, run = BlockGraphs(), DenoiserRun()
    streams = [torch.randn(1, tokens, 128) for tokens in (15, 4)]
    shared = denoiser.shared(streams[0], streams[1], (5, 3), None, None, run)
    tables = run.modulation(denoiser, SIGMA, torch.float32).tables()
    want = run_blocks(denoiser.blocks, streams, tables, shared)
    for _ in range(3):
        after = graphs.run_blocks(denoiser.blocks[:1], streams, tables[:1], shared)
        (got,) = graphs.run_blocks(denoiser.blocks[1:], after, tables[1:], shared)
        assert torch.equal(got, want[0])
    assert graphs.runs == runs(4, 2, 2)


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.attn.img_qkv.weight",
        "transformer_blocks.1.attn.to_out.0.bias",
        "transformer_blocks.1.attn.norm_added_k.weight",
        "transformer_blocks.2.img_norm1.weight",
        "transformer_blocks.0.txt_mlp.w3.weight",
    ],
)
def test_a_replaced_weight_leads_to_a_new_recording(denoiser: LensDenoiser, recording: list, name: str):
    """As a LoRA is merged, and taken off again."""
    forward = settled(denoiser, BlockGraphs())
    layer = denoiser.get_submodule(name.rpartition(".")[0])
    attribute = name.rpartition(".")[2]
    before = getattr(layer, attribute)
    setattr(layer, attribute, nn.Parameter(before * 1.5, requires_grad=False))
    assert [forward() for _ in range(3)] == [{"launched": 1}, {"played": 1, "recorded": 1}, {"played": 1}]
    setattr(layer, attribute, before)
    assert forward() == {"played": 1}, "the first one is valid again"


def test_a_weight_that_moved_leads_to_a_new_recording(denoiser: LensDenoiser, recording: list):
    """As a model that was unloaded and came back: the layer's parameter is the same object."""
    forward = settled(denoiser, BlockGraphs())
    weight: Any = denoiser.blocks[1].img_mlp.w1.weight
    weight.data = weight.data.clone()
    assert forward() == {"launched": 1}


def test_a_weight_changed_in_place_is_read_anew(denoiser: LensDenoiser, recording: list):
    forward = settled(denoiser, BlockGraphs())
    denoiser.blocks[1].img_mlp.w1.weight.mul_(1.5)
    assert forward() == {"played": 1}


def test_the_modulations_weights_are_no_part_of_it(denoiser: LensDenoiser, recording: list):
    """They leave the GPU while the steps run."""
    forward = settled(denoiser, BlockGraphs())
    for name, layer in denoiser.named_modules():
        if is_modulation(name):
            layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)
            layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
    assert forward() == {"played": 1}


def test_all_other_weights_are_looked_at(denoiser: LensDenoiser):
    graphs = BlockGraphs()
    found = [id(weight) for weight in graphs._weights(denoiser.blocks)]
    named = denoiser.transformer_blocks.named_parameters()
    assert sorted(found) == sorted(id(weight) for name, weight in named if "_mod.1." not in name)
    assert found == [id(weight) for weight in graphs._weights(denoiser.blocks)], "always in one order"


def name_of(denoiser: LensDenoiser, streams: Sequence[Tensor], shared: Shared) -> Any:
    return module._name(BlockGraphs()._weights(denoiser.blocks), streams, shared)


def test_what_a_recording_is_named_by(denoiser: LensDenoiser):
    image, text = torch.zeros(1, 15, 128), torch.zeros(1, 4, 128)
    first, second, _ = (block.attn for block in denoiser.blocks)
    shared = shared_with(bounded=frozenset([first]))
    name = name_of(denoiser, [image, text], shared)
    assert name == name_of(denoiser, [image + 1, text.clone()], replace(shared, rotary=torch.ones(1)))
    assert hash(name) is not None
    others = [
        ([image], shared),
        ([image, text[:, :3]], shared),
        ([text, image], shared),
        ([image.expand(2, -1, -1), text.expand(2, -1, -1)], shared),
        ([torch.cat([x, x], dim=1) for x in (image, text)], shared),  # as many numbers as two pictures
        ([image.half(), text.half()], shared),
        ([image, text], replace(shared, kernels=SimpleNamespace(name="torch"))),
        ([image, text], replace(shared, bounded=frozenset())),
        ([image, text], replace(shared, bounded=frozenset([first, second]))),
        # Another layer's scores are too large than before: as many, but not the same, are bounded.
        ([image, text], replace(shared, bounded=frozenset([second]))),
    ]
    names = [name, *(name_of(denoiser, *other) for other in others)]
    assert len(set(names)) == len(names)


def widths(denoiser: LensDenoiser, graphs: BlockGraphs, *columns: int) -> None:
    for width in columns:
        check(denoiser, graphs, *inputs((1, width), 1))


def test_the_size_that_was_not_used_for_longest_is_forgotten(denoiser: LensDenoiser, recording: list):
    graphs = BlockGraphs()
    widths(denoiser, graphs, *2 * list(range(1, 9)))
    assert graphs.runs == runs(8, 8, 8)
    widths(denoiser, graphs, 1, 9)
    assert graphs.runs == runs(9, 8, 9), "eight are kept, and 2 was not used for longest"
    widths(denoiser, graphs, 1, 3, 4, 5, 6, 7, 8)
    assert graphs.runs == runs(16, 8, 9)
    widths(denoiser, graphs, 2)
    assert graphs.runs == runs(16, 8, 10)
    widths(denoiser, graphs, 2, 2)
    assert graphs.runs == runs(18, 9, 10)


def test_cleared_graphs_are_recorded_again_in_other_memory(denoiser: LensDenoiser, recording: list):
    graphs = BlockGraphs()
    forward = settled(denoiser, graphs)
    graphs.clear()
    assert graphs._pool is None and not graphs._recorded
    assert [forward() for _ in range(3)] == [{"launched": 1}, {"played": 1, "recorded": 1}, {"played": 1}]
    assert [pool for _, pool in recording] == [1, 2]


def test_a_recording_that_fails_is_tried_again(denoiser: LensDenoiser, recording: list, monkeypatch):
    """Out of memory, say. Nothing half-made is kept."""
    graphs, arguments = BlockGraphs(), inputs()
    denoiser(*arguments, graphs=graphs)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_Recording", None)
        with pytest.raises(TypeError):
            denoiser(*arguments, graphs=graphs)
    check(denoiser, graphs, *arguments)
    assert graphs.runs == runs(1, 1, 1)
