"""The encoder against transformers' GptOssModel with the same weights, and what callers rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lens_core.config import CAPTURED_LAYERS, EncoderConfig
from lens_core.encoder import GptOssEncoder, PrefixCache, encode_prompts, no_features
from lens_core.loading import load_encoder
from tests.compare import per_token_l2

# fp32 (6e-8) over 24 layers of attention and experts, summed in another order than transformers does;
# measured: median 1e-6, worst token 3e-6. The median is held to that, single tokens are not: where a
# token's 4th and 5th router logits are nearly equal, either implementation may choose the other expert
# and that token (and, a little, those that see it) is legitimately different. Of long prompts, in which
# nearly all tokens may see such a one, those are taken whose logits are TIED nowhere: 20 times the error.
MEDIAN = 5e-6
OUTLIER = 1e-5
OUTLIERS_ALLOWED = 0.01
TIED = 2e-5


@pytest.fixture
def encoder(tiny_folder: Path) -> GptOssEncoder:
    return load_encoder(tiny_folder, torch.float32)[0]


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Callable[[Tensor], Tensor]:
    """ids [1, S] -> features [1, S, 4, H] by transformers."""
    from transformers import GptOssConfig, GptOssModel
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    with torch.inference_mode(False):
        weights = {}
        for shard in (tiny_folder / "text_encoder").glob("*.safetensors"):
            for name, tensor in load_file(shard).items():
                weights[name.removeprefix("model.")] = tensor
        del weights["lm_head.weight"]
        vocabulary, hidden = weights["embed_tokens.weight"].shape
        experts, inner_twice = weights["layers.0.mlp.experts.gate_up_proj_bias"].shape
        config = GptOssConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner_twice // 2,
            num_hidden_layers=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_local_experts=experts,
            num_experts_per_tok=4,
            sliding_window=128,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        )
        config._attn_implementation = config._experts_implementation = "eager"
        dense = {}
        for name, tensor in weights.items():
            if name.endswith("_blocks"):
                bank = name.removesuffix("_blocks")
                scales = weights[bank + "_scales"]
                dense[bank] = convert_moe_packed_tensors(tensor, scales, dtype=torch.float32)
            elif not name.endswith("_scales"):
                dense[name] = tensor.float()
        model = GptOssModel(config).eval()
        model.load_state_dict(dense)
    captured: list[Tensor] = []
    for layer in (5, 11, 17, 23):
        model.layers[layer].register_forward_hook(lambda module, args, out: captured.append(out))

    def note(router: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        values = F.linear(args[0], router.weight, router.bias).topk(config.num_experts_per_tok + 1).values
        features.gaps.append((values[..., -2] - values[..., -1]).min().item())

    for layer in model.layers:
        layer.mlp.router.register_forward_pre_hook(note)

    def features(ids: Tensor) -> Tensor:
        captured.clear()
        features.gaps = []
        model(input_ids=ids, use_cache=False)
        return torch.stack(captured, dim=2)

    return features


def run(encoder: GptOssEncoder, ids: Tensor, dtype: torch.dtype = torch.float32, **options) -> Tensor:
    """Features [B, S, L, H] of ids [B, S], without a prefix."""
    return torch.cat(encode_prompts(encoder, (), ids.tolist(), "cpu", dtype, **options))


def random_ids(encoder: GptOssEncoder, length: int) -> Tensor:
    return torch.randint(0, encoder.config.vocab_size, (1, length))


def agrees(got: Tensor, want: Tensor) -> bool:
    error = per_token_l2(got, want)
    return bool(error.median() < MEDIAN and (error > OUTLIER).double().mean() <= OUTLIERS_ALLOWED)


# 200 and 600 tokens reach past the sliding window of 128.
@pytest.mark.parametrize("length", [1, 30, 200, 600])
def test_features_equal_transformers(encoder: GptOssEncoder, reference: Callable, length: int):
    ids = random_ids(encoder, length)
    got = run(encoder, ids, torch.float32)
    assert got.shape == (1, length, 4, encoder.config.hidden_size)
    assert agrees(got, reference(ids))


def test_a_batch_of_equal_lengths_equals_each_prompt_alone(encoder: GptOssEncoder, reference: Callable):
    ids = torch.cat([random_ids(encoder, 150), random_ids(encoder, 150)])
    assert agrees(run(encoder, ids, torch.float32), torch.cat([reference(one[None]) for one in ids]))


def test_one_layer_in_bf16_stays_close_to_fp32(tiny_folder: Path, encoder: GptOssEncoder):
    rounded = load_encoder(tiny_folder, torch.bfloat16)[0]
    ids = random_ids(encoder, 200)
    got = run(rounded, ids, torch.bfloat16, captured=(0,))
    want = run(encoder, ids, torch.float32, captured=(0,))
    assert got.dtype == torch.bfloat16
    # bf16 rounds by up to 2^-9 = 0.2 %, some 20 times in a layer: 1 %, as measured. transformers' bf16 run,
    # which rounds the softmax too, is 2.4 % off and must not be what this is. One layer and the median,
    # because at this precision near-ties of the router flip one expert in a hundred.
    assert per_token_l2(got, want).median() < 0.015


def test_swapped_sliding_and_full_layers_are_noticed(
    encoder: GptOssEncoder, reference: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(EncoderConfig, "is_sliding", lambda _, layer: layer % 2 == 1)
    ids = random_ids(encoder, 200)
    assert not agrees(run(encoder, ids), reference(ids))


def test_a_window_one_token_wider_is_noticed(
    encoder: GptOssEncoder, reference: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encoder, "config", replace(encoder.config, sliding_window=129))
    ids = random_ids(encoder, 200)
    assert not agrees(run(encoder, ids), reference(ids))


def test_missing_sinks_are_noticed(encoder: GptOssEncoder, reference: Callable):
    for layer in encoder.layers:
        layer.self_attn.sinks.zero_()
    ids = random_ids(encoder, 30)
    assert not agrees(run(encoder, ids, torch.float32), reference(ids))


def test_features_of_other_layers_are_noticed(encoder: GptOssEncoder, reference: Callable):
    ids = random_ids(encoder, 30)
    assert not agrees(run(encoder, ids, torch.float32, captured=(4, 10, 16, 22)), reference(ids))


def test_a_published_config_alternates_sliding_first():
    config = EncoderConfig()
    assert [config.is_sliding(layer) for layer in range(4)] == [True, False, True, False]
    assert CAPTURED_LAYERS == (5, 11, 17, 23)


@pytest.mark.parametrize("tails", [(23,), (42, 132), (415, 1, 222)], ids=str)
@pytest.mark.parametrize("prefix", [97, 5])
def test_packed_prompts_behind_a_cached_prefix_equal_transformers(
    encoder: GptOssEncoder, reference: Callable, prefix: int, tails: tuple[int, ...]
):
    """Cold (the prefix runs along), then warm (its keys and values are kept): both are each whole chat's."""
    head = random_ids(encoder, prefix)[0].tolist()
    prompts = [random_ids(encoder, length)[0].tolist() for length in tails]
    cache = PrefixCache()
    cold = encode_prompts(encoder, head, prompts, "cpu", torch.float32, cache=cache)
    warm = encode_prompts(encoder, head, prompts, "cpu", torch.float32, cache=cache)
    for got_cold, got_warm, prompt in zip(cold, warm, prompts, strict=True):
        want = reference(torch.tensor([head + prompt]))[:, prefix:]
        assert got_cold.shape == got_warm.shape == want.shape
        assert agrees(got_cold, want) and agrees(got_warm, want)


def test_the_cached_prefix_is_kept_and_replaced(encoder: GptOssEncoder):
    """A second prompt runs only its own tokens; another date or dtype is another prefix."""
    seen = []
    encoder.embed_tokens.register_forward_hook(lambda _, ids, __: seen.append(len(ids[0])))
    cache, head = PrefixCache(), list(range(30))
    for first, dtype in ((0, torch.float32), (0, torch.float32), (1, torch.float32), (1, torch.bfloat16)):
        encode_prompts(encoder, [first, *head], [[1, 2, 3]], "cpu", dtype, cache=cache)
    assert seen == [3, 31, 3, 3, 31, 3, 31]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_run_gives_the_same_bits_as_later_ones(encoder: GptOssEncoder, dtype: torch.dtype):
    """A picture must not depend on whether another prompt was encoded before it."""
    cache = PrefixCache()
    head, tails = random_ids(encoder, 97)[0].tolist(), [random_ids(encoder, 40)[0].tolist()]
    cold, warm = (encode_prompts(encoder, head, tails, "cpu", dtype, cache=cache)[0] for _ in range(2))
    assert torch.equal(cold, warm)


def test_the_prefixs_keys_take_five_megabytes_at_full_size():
    config = EncoderConfig()
    elements = config.num_hidden_layers * 2 * 97 * config.num_key_value_heads * config.head_dim
    assert 2 * elements == 4_767_744


def test_a_prompt_longer_than_one_block_of_queries(encoder: GptOssEncoder, reference: Callable):
    """512 queries at a time: the second block's keys begin with the first one's."""
    for _ in range(20):
        ids = random_ids(encoder, 1100)
        want = reference(ids)
        if min(reference.gaps) > TIED:
            break
    assert min(reference.gaps) > TIED
    assert per_token_l2(run(encoder, ids), want).max() < OUTLIER


def test_the_pipelines_features_are_the_prompts_and_the_suffixs(tiny_folder: Path, encoder: GptOssEncoder):
    tokenizer = load_encoder(tiny_folder, torch.float32)[1]
    ids = list(tokenizer("a red circle").ids)
    prefix = len(tokenizer.prefix)
    (got,) = encode_prompts(encoder, ids[:prefix], [ids[prefix:]], "cpu", torch.float32)
    assert got.shape[1] == len(tokenizer.encode("a red circle")) + len(tokenizer.suffix)
    assert agrees(got, run(encoder, torch.tensor([ids]))[:, prefix:])


def test_later_tokens_do_not_change_earlier_features(encoder: GptOssEncoder):
    ids = random_ids(encoder, 60)
    short, long = run(encoder, ids[:, :40]), run(encoder, ids, torch.float32)
    # Causal, so equal but for the summation order in differently shaped matrix products.
    assert per_token_l2(long[:, :40], short).median() < MEDIAN


def test_no_features_are_four_layers_of_nothing(encoder: GptOssEncoder):
    got = no_features(encoder, 4, torch.bfloat16)
    assert got.shape == (1, 0, 4, encoder.config.hidden_size)
    assert got.dtype == torch.bfloat16


def test_on_layer_counts_to_24(encoder: GptOssEncoder):
    calls = []
    run(encoder, random_ids(encoder, 5), on_layer=lambda *call: calls.append(call))
    assert calls == [(done, 24) for done in range(1, 25)]


def test_on_layer_may_raise_to_cancel(encoder: GptOssEncoder):
    ran = []
    encoder.layers[7].register_forward_hook(lambda *_: ran.append(7))

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise InterruptedError

    ids = random_ids(encoder, 5)[0].tolist()
    with pytest.raises(InterruptedError):
        encode_prompts(encoder, (), [ids], "cpu", torch.float32, on_layer=stop)
    assert not ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_are_bitwise_equal(tiny_folder: Path, dtype: torch.dtype):
    encoder = load_encoder(tiny_folder, dtype)[0]
    ids = random_ids(encoder, 200)
    assert torch.equal(run(encoder, ids, dtype), run(encoder, ids, dtype))


def test_a_prompt_of_nothing_among_others(encoder: GptOssEncoder):
    empty, got = encode_prompts(encoder, [5, 6], [(), (1, 2, 3)], "cpu", torch.float32)
    assert empty.shape == (1, 0, 4, encoder.config.hidden_size)
    assert torch.equal(got, encode_prompts(encoder, [5, 6], [(1, 2, 3)], "cpu", torch.float32)[0])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_prompts_of_nothing_alone(encoder: GptOssEncoder, count: int):
    got = encode_prompts(encoder, [5, 6], [()] * count, "cpu", torch.float32)
    assert [one.shape for one in got] == [(1, 0, 4, encoder.config.hidden_size)] * count
