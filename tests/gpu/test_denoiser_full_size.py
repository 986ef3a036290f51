"""The denoiser's fast paths at the published sizes, against plain PyTorch in fp32.

Random weights; the bound of every error is plain PyTorch's own in bf16, and a tenth for luck in rounding.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lens_core.denoiser import BlockGraphs, DenoiserRun, LensDenoiser, transformer
from lens_core.kernels import EAGER_BLOCK, block, block_registry
from lens_core.kernels.block import HeadNorms, Rows
from lens_core.loading import load_denoiser
from lens_core.ops import sdpa
from tests.compare import cosine, relative_l2

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
LUCK = 1.1
HEADS, DIM, HIDDEN = 24, 64, 1536


@pytest.fixture(scope="module", autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(full_models: Path) -> LensDenoiser:
    path = full_models / "diffusion_models" / "lens_turbo_bf16.safetensors"
    return load_denoiser(path, torch.bfloat16).to(CUDA).requires_grad_(False)


@pytest.fixture(scope="module")
def exact(model: LensDenoiser) -> LensDenoiser:
    return copy.deepcopy(model).float()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch):
    """A call that runs as on a machine without Triton, by PyTorch's attention."""

    def run(network: LensDenoiser, *arguments, **options) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "choose_block", lambda *_: EAGER_BLOCK)
            return network(*arguments, attention=sdpa, **options)

    return run


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=CUDA).to(dtype)


def inputs(grid: tuple[int, int], text: int, batch: int = 1, level: float = 0.5) -> tuple:
    """Latents, sigma (1000 times it exact in bf16), features and grid."""
    size = torch.tensor([1.0, 5.0, 20.0, 100.0], device=CUDA)[:, None]
    features = (size * normal(batch, text, 4, 2880)).bfloat16()
    return normal(batch, grid[0] * grid[1], 128), torch.full((batch,), level, device=CUDA), features, grid


def in_fp32(arguments: tuple) -> tuple:
    latents, sigma, features, grid = arguments
    return latents.float(), sigma, features.float(), grid


def shapes(text: int) -> list[int]:
    return [8100] if text == 0 else [4096, text]


@pytest.mark.parametrize("text", [0, 1, 200, 333])
def test_kernels_round_no_worse_than_their_definitions(text: int):
    """Each at Lens' widths, batch 2, from the same bf16 inputs; the definitions in fp32 say what is right."""
    fast = block_registry.triton_block_kernels()
    tables = [normal(2, 48, 2, 6 * HIDDEN)[:, 5, index] for index in (0, 1)]
    rows = [
        Rows(normal(2, n, HIDDEN), normal(2, n, HIDDEN), table, 1 + normal(HIDDEN) / 8, 1e-6, table)
        for n, table in zip(shapes(text), tables, strict=False)
    ]
    qkv = [normal(2, n, 3 * HIDDEN) for n in shapes(text)]
    angle = normal(sum(shapes(text)), DIM // 2, dtype=torch.float32)
    rotary = torch.stack([angle.cos(), angle.sin()])
    norms = [HeadNorms(1 + normal(DIM) / 8, 1 + normal(DIM) / 8, 1e-6) for _ in qkv]
    ups = [normal(2, n, 4096) for n in shapes(text)]

    def run(kernels, cast) -> dict[str, list[Tensor]]:
        streams = [cast(x).clone() for x in qkv]
        low = [Rows(*(cast(x) if isinstance(x, Tensor) else x for x in row)) for row in rows]
        gains = [HeadNorms(cast(norm.q), cast(norm.k), norm.eps) for norm in norms]
        totals, normed = kernels.add_modulate(low, 2, 3)
        return {
            "add": totals,
            "norm": normed,
            "heads": list(kernels.joint_heads([x.clone() for x in streams], gains, rotary)),
            "attend": (kernels.attend or block.attend)(streams, gains, rotary, False),
            "swiglu": kernels.swiglu([cast(x).clone() for x in ups], [cast(x) for x in ups]),
        }

    want = run(EAGER_BLOCK, Tensor.float)
    definition, got = (run(kernels, lambda x: x) for kernels in (EAGER_BLOCK, fast))
    for name in want:
        for index, right in enumerate(want[name]):
            ours, theirs = (relative_l2(found[name][index], right) for found in (got, definition))
            print(f"{name} {index}: {ours:.2e}, the definition in bf16 {theirs:.2e}")
            assert ours <= LUCK * theirs, name  # values are copied: no error at all


def test_attention_bears_values_of_1e5():
    """Scores at the limit of what is let through, values as large as the checkpoint's."""
    fast = block_registry.triton_block_kernels()
    gain = (block.SCORE_LIMIT / DIM**0.5) ** 0.5
    weight = torch.full((DIM,), 0.999 * gain, device=CUDA).bfloat16()
    norms = [HeadNorms(weight, weight, 1e-6)] * 2
    qkv = [normal(1, n, 3 * HIDDEN) for n in (8100, 200)]
    for x in qkv:
        x[..., 2 * HIDDEN :] *= 1.4e5 / x[..., 2 * HIDDEN :].abs().max()
    angle = normal(8300, DIM // 2, dtype=torch.float32)
    rotary = torch.stack([angle.cos(), angle.sin()])
    exact = [HeadNorms(weight.float(), weight.float(), 1e-6)] * 2
    want = torch.cat(block.attend([x.float() for x in qkv], exact, rotary, False), 1)
    plain = torch.cat(block.attend([x.clone() for x in qkv], norms, rotary, False), 1)
    assert fast.attend is not None
    got = torch.cat(fast.attend([x.clone() for x in qkv], norms, rotary, False), 1)
    assert got.isfinite().all()
    assert relative_l2(got, want) < LUCK * relative_l2(plain, want)


@pytest.mark.parametrize(
    ("grid", "text", "batch"),
    [((64, 64), 200, 1), ((64, 64), 0, 1), ((90, 90), 333, 1), ((46, 92), 77, 2), ((32, 32), 1, 2)],
    ids=["1024", "1024 no text", "1440", "1472x736 B=2", "512 B=2"],
)
def test_every_fast_path_rounds_no_worse_than_plain_torch(model, exact, plain, grid, text, batch):
    arguments = inputs(grid, text, batch)
    want = plain(exact, *in_fp32(arguments))
    bound = LUCK * relative_l2(plain(model, *arguments), want)
    run, graphs = DenoiserRun([0.5, 0.25]), BlockGraphs()
    paths = {
        "alone": model(*arguments),
        "in a run": model(*arguments, run=run),
        "PyTorch's attention": model(*arguments, run=run, attention=sdpa),
        "recorded": [model(*arguments, run=run, graphs=graphs) for _ in range(3)][-1],
    }
    assert graphs.runs == {"played": 2, "recorded": 1, "launched": 1}
    for name, got in paths.items():
        print(
            f"{name}: {relative_l2(got, want):.2e}, bound {bound:.2e}, cosine {cosine(got, want).min():.6f}"
        )
        assert relative_l2(got, want) < bound, name
    assert torch.equal(paths["recorded"], paths["in a run"])
    assert torch.equal(paths["in a run"], model(*arguments, run=DenoiserRun([0.5, 0.25])))
    # One row of the table or twenty: another split of the same sums.
    assert relative_l2(paths["alone"], paths["in a run"]) < bound


def test_a_padded_batch_rounds_no_worse(model, exact, plain):
    arguments = inputs((64, 64), 200, 2)
    real = torch.arange(200, device=CUDA) < torch.tensor([[200], [60]], device=CUDA)
    want = plain(exact, *in_fp32(arguments), text_real=real)
    bound = LUCK * relative_l2(plain(model, *arguments, text_real=real), want)
    assert relative_l2(model(*arguments, text_real=real), want) < bound


def test_extreme_values_and_residuals(model, plain):
    """The last blocks' values scaled to 1.4e5 and the residual stream to 3e7, as the checkpoint's are."""
    extreme = copy.deepcopy(model)
    for index in (44, 45, 46):
        layer = extreme.blocks[index].attn
        for qkv in (layer.img_qkv, layer.txt_qkv):
            qkv.weight[2 * HIDDEN :] *= 3e4
            qkv.bias[2 * HIDDEN :] *= 3e4
    for out in (extreme.blocks[44].attn.to_out[0], extreme.blocks[44].attn.to_add_out):
        out.weight *= 3e2
    arguments = inputs((64, 64), 200)
    want = plain(copy.deepcopy(extreme).float(), *in_fp32(arguments))
    got = extreme(*arguments)
    assert got.isfinite().all()
    assert relative_l2(got, want) < LUCK * relative_l2(plain(extreme, *arguments), want)


def test_graphs_survive_changes(model):
    """Of prompt, its length, size and weights: always the bits of plain launches; old graphs come back."""
    graphs, run = BlockGraphs(), DenoiserRun([0.5])
    sizes = (((64, 64), 200), ((64, 64), 77), ((32, 32), 200), ((64, 64), 0))
    other = [inputs(grid, text) for grid, text in sizes]
    for arguments in other * 3:
        assert torch.equal(model(*arguments, run=run, graphs=graphs), model(*arguments, run=run))
    assert graphs.runs == {"played": 8, "recorded": 4, "launched": 4}
    changed = inputs((64, 64), 200, level=0.5)
    changed = (changed[0].flip(1), changed[1], changed[2].flip(1), changed[3])
    assert torch.equal(model(*changed, run=run, graphs=graphs), model(*changed, run=run))
    layer = model.blocks[3].attn.img_qkv
    before = layer.weight
    layer.weight = torch.nn.Parameter(before * 1.5, requires_grad=False)  # as a LoRA is merged
    for _ in range(3):
        assert torch.equal(model(*changed, run=run, graphs=graphs), model(*changed, run=run))
    layer.weight = before
    assert torch.equal(model(*changed, run=run, graphs=graphs), model(*changed, run=run))
    held = torch.cuda.memory_reserved(CUDA)
    graphs.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(CUDA) < held


def test_new_sizes_compile_nothing(model):
    """Whatever a user asks for after the first picture."""
    from lens_core.kernels.triton import block as kernels
    from lens_core.kernels.triton import joint_attention

    compiled = [kernels.add_modulate, kernels.turn_heads, kernels.swiglu, joint_attention.attend]

    def variants() -> list[int]:
        return [len(kernel.device_caches[CUDA.index][0]) for kernel in compiled]

    for text in (0, 200):
        model(*inputs((64, 64), text))
    before = variants()
    for grid, text, batch in (((45, 91), 7, 1), ((1, 2), 1, 1), ((32, 32), 0, 3), ((90, 90), 512, 2)):
        model(*inputs(grid, text, batch))
    assert variants() == before


def test_what_changes_the_attention_falls_back(model, exact, plain):
    """Norms with weights beyond the limit: PyTorch's attention in that block, and the same accuracy."""
    large = copy.deepcopy(model)
    for index in (7, 30):
        for norm in large.blocks[index].attn.norms():
            norm.weight *= 4
    run = DenoiserRun()
    arguments = inputs((64, 64), 200)
    got = large(*arguments, run=run)
    assert len(run.bounded(large, arguments[0])) == 46
    want = plain(copy.deepcopy(large).float(), *in_fp32(arguments))
    assert relative_l2(got, want) < LUCK * relative_l2(plain(large, *arguments), want)


def test_a_recording_keeps_to_its_own_memory(model):
    """What it plays is not touched by what is computed in between."""
    run, graphs = DenoiserRun([0.5]), BlockGraphs()
    first, second = inputs((64, 64), 200), inputs((90, 90), 50)
    want = model(*first, run=run)
    for _ in range(2):
        model(*first, run=run, graphs=graphs)
        model(*second, run=run, graphs=graphs)
    kept = model(*first, run=run, graphs=graphs)
    model(*second, run=run, graphs=graphs)
    torch.empty(1 << 30, dtype=torch.uint8, device=CUDA).fill_(255)
    assert torch.equal(model(*first, run=run, graphs=graphs), want)
    assert torch.equal(kept, want)
