"""The encoder's kernels compiled, at GPT-OSS-20B's sizes; its features, places and memory.

Random routers sit on so many near-ties that rounding picks other experts, which says nothing about
precision; so where two runs are compared, the second one takes the first one's choices.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lens_core import kernels
from lens_core.config import EncoderConfig
from lens_core.encoder import PrefixCache, encode_prompts
from lens_core.kernels import eager, registry
from lens_core.loading import open_encoder
from lens_core.text_encoder import TextEncoder
from tests.compare import per_token_l2, relative_l2

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CONFIG = EncoderConfig()
ENCODER = "gpt_oss_20b_mxfp4.safetensors"
PREFIX = list(range(1000, 1097))


def prompt(length: int) -> list[int]:
    return [(37 * i + 11) % 200 for i in range(length)]


@pytest.fixture(scope="module")
def text(full_models: Path) -> Iterator[TextEncoder]:
    """The full-size encoder in bf16, every layer on the GPU."""
    text = TextEncoder(open_encoder(full_models / "text_encoders" / ENCODER), torch.bfloat16)
    text.load(CUDA, math.inf)
    yield text
    text.unload()


def encode(text: TextEncoder, *lengths: int, prefix=PREFIX, **options) -> list[Tensor]:
    options = {"layers": text.layers, **options}
    with torch.inference_mode():
        return encode_prompts(text.model, prefix, [prompt(n) for n in lengths], CUDA, text.dtype, **options)


@contextmanager
def routes(monkeypatch: pytest.MonkeyPatch, seen: list[Tensor] | None, forced: list[Tensor] | None):
    """Record every layer's choice of experts in ``seen``, or take ``forced`` ones (for the last tokens)."""
    choose, layer = kernels.choose, iter(forced or [])

    def chosen(*arguments):
        backend = choose(*arguments)

        def route(x, weight, bias, top_k):
            if forced is None:
                result = backend.route(x, weight, bias, top_k)
                seen.append(result[0])
                return result
            logits = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
            own = logits.topk(top_k).indices
            given = next(layer)[-len(x) :].long()
            own[-len(given) :] = given
            return own.int(), logits.gather(1, own).softmax(-1)

        return dataclasses.replace(backend, route=route)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "choose", chosen)
        yield


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("tokens", [1, 12, 172, 415])
def test_compiled_experts_equal_the_definition(tokens: int, form: str):
    generator = torch.Generator().manual_seed(tokens)
    bank = registry.random_bank(32, 2880, 2880, form, generator, CUDA)
    x = torch.randn(tokens, 2880, generator=generator).to(CUDA, torch.bfloat16)
    chosen = torch.rand(tokens, 32, generator=generator).topk(4).indices.int().to(CUDA)
    routing = torch.rand(tokens, 4, generator=generator).to(CUDA).softmax(-1)
    got = registry.triton_kernels().experts(x, chosen, routing, bank)
    again = registry.triton_kernels().experts(x, chosen, routing, bank)
    exact = eager.experts(x.float(), chosen, routing, bank)
    plain = eager.experts(x, chosen, routing, bank)
    errors = relative_l2(got, exact), relative_l2(plain, exact)
    print(f"{form} {tokens} tokens: Triton {errors[0]:.2e}, plain {errors[1]:.2e} from fp32")
    # bf16 rounds the activation between the products: 2^-9 / sqrt(3) = 1.1e-3 and a little for large ones.
    assert errors[0] < 4e-3
    assert torch.equal(got, again), "not deterministic"


def test_every_code_and_scale_decodes_exactly():
    """A matrix holding all 256 bytes under every scale byte, times unit vectors."""
    for form, codes in (("mxfp4", range(4, 129, 4)), ("nvfp4", range(0, 127, 4))):
        bank = registry.random_bank(2, 256, 512, form, torch.Generator().manual_seed(0), CUDA)
        gate, down = bank.gate_up, bank.down
        down.blocks.copy_(
            torch.arange(256, dtype=torch.uint8, device=CUDA).view(16, 16).expand_as(down.blocks)
        )
        for code in codes:
            down.scales.fill_(code)
            down.bias.zero_()
            weight = eager.dense(down, torch.float32)
            inner = torch.eye(512, device=CUDA)
            got = _down_alone(inner, bank._replace(gate_up=gate, down=down))
            assert torch.equal(got, weight[0].T), f"{form} scale byte {code}"


def _down_alone(x: Tensor, bank: kernels.Bank) -> Tensor:
    """The second kernel on rows x [T, I] of expert 0, weights 1."""
    from lens_core.kernels.triton import experts, launch

    pairs, inner = x.shape
    chosen = torch.zeros(pairs, 1, dtype=torch.int32, device=CUDA)
    source, offsets = launch._sorted(chosen, 2)
    out = torch.empty(pairs, bank.down.bias.shape[1], device=CUDA)
    block = launch._TILES[32][1]
    tiles = pairs // 32 + 1
    rows = launch.planes(x.bfloat16())
    ones = torch.ones(pairs, 1, device=CUDA)
    settings = launch._settings(bank.down, rows, 32, block)
    experts.down[launch._grid(tiles, out.shape[1], block)](
        rows,
        source,
        ones,
        *launch._operands(bank.down),
        out,
        offsets,
        tiles,
        K=inner,
        N=out.shape[1],
        **settings,
    )
    return out


@pytest.mark.parametrize("after", [0, 97])
def test_compiled_attention_and_norms_equal_the_definition(after: int):
    from lens_core.encoder.attention import yarn_table
    from lens_core.encoder.packing import pack
    from lens_core.kernels import AttentionPlan

    generator = torch.Generator().manual_seed(0)
    packing = pack([prompt(172), prompt(415), prompt(1)], after)
    tokens = len(packing.ids)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(CUDA, torch.bfloat16)

    q, k, v, past = normal(tokens, 64, 64), normal(tokens, 8, 64), normal(tokens, 8, 64), normal(2, 97, 8, 64)
    sinks = normal(64)
    rotary = yarn_table(CONFIG, packing.positions.to(CUDA))
    for sliding in (True, False):
        plans = [
            AttentionPlan(packing.blocks, packing.positions, rotary, 97, 128, t)
            for t in (q.dtype, torch.float32)
        ]
        got = registry.triton_kernels().attention(q, k, v, past, sinks, plans[0], sliding)
        plain = eager.attention(q, k, v, past, sinks, plans[0], sliding)
        wide = [t.float() for t in (q, k, v, past, sinks)]
        exact = eager.attention(*wide, plans[1], sliding)
        errors = relative_l2(got, exact), relative_l2(plain, exact)
        print(f"attention, sliding {sliding}: Triton {errors[0]:.2e}, plain {errors[1]:.2e} from fp32")
        # Rotated keys, softmax weights and the result are each rounded to bf16.
        assert errors[0] < 6e-3
    x, updates, weight = (
        torch.randn(300, 2880, device=CUDA),
        normal(300, 4 * 2880).view(300, 4, 2880),
        normal(2880),
    )
    for kernel, one in (
        (registry.triton_kernels().add_norm, updates),
        (registry.triton_kernels().add_norm, None),
    ):
        total, normed = kernel(x, one, weight, 1e-5, torch.bfloat16)
        want, want_normed = eager.add_norm(x, one, weight, 1e-5, torch.float32)
        assert relative_l2(total, want) < 1e-6
        assert relative_l2(normed, want_normed) < 3e-3


def test_features_with_values_as_in_the_trained_model(text: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    """A few channels of the stream reach 1e4 there: their rounding must not drown the others'."""
    massive = text.model.embed_tokens.weight.clone()
    massive[:, [5, 700, 2222]] *= 3000
    monkeypatch.setitem(text.model._modules, "embed_tokens", torch.nn.Embedding.from_pretrained(massive))
    seen: list[Tensor] = []
    with routes(monkeypatch, seen, None):
        (got,) = encode(text, 172)
    assert torch.isfinite(got).all() and got.abs().max() > 3000
    model = copy.deepcopy(text.model).float().to(CUDA)
    with routes(monkeypatch, None, seen), torch.inference_mode():
        (want,) = encode_prompts(model, PREFIX, [prompt(172)], CUDA, torch.float32)
    off = [per_token_l2(got[:, :, i].float(), want[:, :, i]).median().item() for i in range(4)]
    print(f"massive channels: median {[f'{x:.1e}' for x in off]}")
    assert max(off) < 6e-3


def test_the_backend_is_triton(text: TextEncoder):
    chosen = kernels.choose(CUDA, torch.bfloat16, text.model.experts[0].bank(), text.model.largest_scale())
    assert chosen.name == "triton"


@pytest.mark.parametrize("length", [12, 172, 415])
def test_features_against_an_fp32_reference(text: TextEncoder, monkeypatch: pytest.MonkeyPatch, length: int):
    """Median per-token relative L2 of every captured layer, the same experts chosen."""
    seen: list[Tensor] = []
    with routes(monkeypatch, seen, None):
        (got,) = encode(text, length)
    model = copy.deepcopy(text.model).float()
    with routes(monkeypatch, None, seen), torch.inference_mode():
        (want,) = encode_prompts(model.to(CUDA), PREFIX, [prompt(length)], CUDA, torch.float32)
    off = [per_token_l2(got[:, :, i].float(), want[:, :, i]).median().item() for i in range(4)]
    worst = [per_token_l2(got[:, :, i].float(), want[:, :, i]).max().item() for i in range(4)]
    print(f"{length} tokens: median {[f'{x:.1e}' for x in off]}, worst {[f'{x:.1e}' for x in worst]}")
    # The requirement for bf16: a handful of roundings of 2^-9 in each of 24 layers.
    assert max(off) < 6e-3


def test_a_cached_prefix_gives_the_same_bits(text: TextEncoder):
    cache = PrefixCache()
    first, second = (encode(text, 172, cache=cache)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, encode(text, 172)[0])


def test_packed_prompts_equal_each_alone(text: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    """Up to the rounding of differently shaped products; and so does a prompt padded at its end."""
    cache, lengths = PrefixCache(), (42, 172, 12, 415)
    encode(text, 5, cache=cache)
    seen: list[Tensor] = []
    with routes(monkeypatch, seen, None):
        packed = encode(text, *lengths, cache=cache)
    start = 0
    for length, got in zip(lengths, packed, strict=True):
        own = [chosen[start : start + length] for chosen in seen]
        start += length
        with routes(monkeypatch, None, own):
            (want,) = encode(text, length, cache=cache)
        off = per_token_l2(got.float(), want.float())
        print(f"{length} of {lengths}: median {off.median():.1e}, worst {off.max():.1e}")
        assert off.median() < 3e-3
    padded_ids = [prompt(172) + [7] * 30]
    own = [torch.cat([chosen[42:214], chosen[:30]]) for chosen in seen]
    with routes(monkeypatch, None, own), torch.inference_mode():
        options = {"cache": cache, "layers": text.layers}
        (padded,) = encode_prompts(text.model, PREFIX, padded_ids, CUDA, text.dtype, **options)
    off = per_token_l2(padded[:, :172].float(), packed[1].float())
    print(f"padded by 30: median {off.median():.1e}, worst {off.max():.1e}")
    assert off.median() < 3e-3


def test_streamed_equals_resident_within_its_memory(text: TextEncoder):
    (want,) = encode(text, 172)
    streaming = TextEncoder(text.file, torch.bfloat16)
    streaming.read()
    encode(streaming, 172)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (got,) = encode(streaming, 172)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"streaming peaks at {peak / 1e9:.2f} GB beside {len(streaming.layers._locked)} page-locked layers")
    assert torch.equal(got, want)
    assert peak < 1.6e9
    assert streaming.layers.loaded == 0
    half = streaming.total // 2
    streaming.load(CUDA, half)
    assert 0 < streaming.layers.loaded <= half
    assert torch.equal(encode(streaming, 172)[0], want)


def test_resident_size(text: TextEncoder):
    """11.44 GB, no embedding; what the store says is what CUDA has."""
    before = torch.cuda.memory_allocated()
    other = TextEncoder(text.file, torch.bfloat16)
    other.load(CUDA, math.inf)
    used = torch.cuda.memory_allocated() - before
    assert used <= 11.5e9
    assert used == pytest.approx(other.total, rel=1e-3)
    assert other.model.embed_tokens.weight.device == CPU
    assert other.unload() == other.total
    assert torch.cuda.memory_allocated() - before < 1e6


def test_dequantised_experts_give_the_same(text: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []
    with routes(monkeypatch, seen, None):
        (want,) = encode(text, 172)
    dense = TextEncoder(text.file, torch.bfloat16, dense=True)
    before = torch.cuda.memory_allocated()
    dense.load(CUDA, math.inf)
    assert torch.cuda.memory_allocated() - before == pytest.approx(dense.total, rel=1e-2)
    with routes(monkeypatch, None, seen):
        (got,) = encode(dense, 172)
    assert per_token_l2(got.float(), want.float()).median() < 6e-3
    del got
    dense.unload()
    assert torch.cuda.memory_allocated() - before < 1e6
