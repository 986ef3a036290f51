"""Local generation against transformers' own, with the same weights, and what callers rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lens_core.loading import open_encoder
from lens_core.reasoner.generate import Decoder, tokens
from lens_core.reasoner.head import LanguageHead, loaded_head
from lens_core.reasoner.sampling import Sampler, Sampling
from lens_core.text_encoder import TextEncoder
from tests import encoder_files as files

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def text(tiny_folder: Path) -> TextEncoder:
    """The tiny encoder in fp32, read once; no test changes it."""
    return TextEncoder(open_encoder(tiny_folder), torch.float32)


@pytest.fixture(scope="module")
def head(text: TextEncoder) -> Iterator[LanguageHead]:
    with torch.inference_mode(), loaded_head(text, CPU) as head:
        yield head


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Callable[..., list[int]]:
    """Ids that transformers generates after these, without stopping."""
    from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM

    packed: dict[str, Tensor] = {}
    for shard in (tiny_folder / "text_encoder").glob("*.safetensors"):
        packed.update(load_file(shard))
    with torch.inference_mode(False):
        config = GptOssConfig.from_pretrained(tiny_folder / "text_encoder")
        del config.quantization_config
        config._attn_implementation = config._experts_implementation = "eager"
        model = GptOssForCausalLM(config).eval()
        dense = files.dense(packed, torch.float32)
        model.load_state_dict(dense)

    def run(ids: list[int], count: int, **options: object) -> list[int]:
        settings = GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=bool(options), pad_token_id=0, **options
        )
        out = model.generate(torch.tensor([ids]), generation_config=settings)
        return out[0, len(ids) :].tolist()

    return run


def random_ids(text: TextEncoder, count: int) -> list[int]:
    return torch.randint(0, text.file.config.vocab_size, (count,)).tolist()


def written(
    text: TextEncoder, head: LanguageHead, ids: list[int], count: int, sampling: Sampling = GREEDY
) -> list[int]:
    sampler = Sampler(sampling, CPU, text.file.config.vocab_size)
    return list(tokens(Decoder(text, head, CPU), ids, sampler, count))


# From within the sliding window of 128 to beyond it, and beyond it from the start, twice around the ring.
@pytest.mark.parametrize("prompt", [90, 300])
def test_greedy_tokens_are_those_of_transformers(text, head, reference, prompt: int):
    ids = random_ids(text, prompt)
    assert written(text, head, ids, 60) == reference(ids, 60)


def test_the_same_seed_draws_the_tokens_of_transformers(text, head, reference):
    ids, sampling = random_ids(text, 30), Sampling(temperature=0.7, top_k=50, seed=11)
    got = written(text, head, ids, 20, sampling)
    assert got == written(text, head, ids, 20, sampling) != written(text, head, ids, 20, Sampling(seed=12))
    torch.manual_seed(11)
    assert got == reference(ids, 20, temperature=0.7, top_k=50)
