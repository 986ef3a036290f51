"""Local generation against transformers' own, with the same weights, and what callers rely on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lens_core import harmony
from lens_core.errors import CheckpointError, SettingError
from lens_core.kernels.registry import EAGER
from lens_core.loading import open_encoder
from lens_core.reasoner import PRESETS, generate
from lens_core.reasoner.generate import Decoder, tokens
from lens_core.reasoner.head import LanguageHead, loaded_head
from lens_core.reasoner.kv_cache import KeyValueCache, cache_bytes
from lens_core.reasoner.local import LocalOptions, rewrite_locally
from lens_core.reasoner.sampling import Sampler, Sampling
from lens_core.text_encoder import TextEncoder
from tests import encoder_files as files
from tests.compare import relative_l2

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


@pytest.fixture(autouse=True)
def _brief_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer has a token for every letter of the presets' texts."""
    monkeypatch.setitem(PRESETS, "short", "Rewrite.")
    monkeypatch.setitem(PRESETS, "poster", "Rewrite.")


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
    got = written(text, head, ids, 12, sampling)
    assert got == written(text, head, ids, 12, sampling) != written(text, head, ids, 12, Sampling(seed=12))
    torch.manual_seed(11)
    assert got == reference(ids, 12, temperature=0.7, top_k=50)


@pytest.mark.parametrize("prompt, more", [(100, 40), (200, 3), (500, 20)], ids=str)
def test_cached_steps_equal_a_full_run(text, head, prompt: int, more: int):
    """Into the ring, around it, and past the first 511 rows of the full layers. fp32 (6e-8) through 24 layers
    that sum in another order: 2e-6 as measured."""
    ids = random_ids(text, prompt + more)
    decoder, whole = Decoder(text, head, CPU), Decoder(text, head, CPU)
    logits = decoder.prefill(ids[:prompt])
    for token in ids[prompt:]:
        logits = decoder.step(token)
    assert relative_l2(logits, whole.prefill(ids)) < 1e-5


def test_sliding_layers_keep_one_window_and_full_ones_all(text):
    config = text.file.config
    cache = KeyValueCache(config, torch.float32, CPU, EAGER)
    cache.begin(600)
    assert [cache.slots[True].capacity, cache.slots[False].capacity] == [128, 1023]
    assert cache.nbytes <= cache_bytes(config, 600, torch.float32) < 1.2 * cache.nbytes
    assert not cache.reserve(1023) and cache.reserve(1024)


def test_a_recorded_step_equals_a_launched_one(text, head, monkeypatch: pytest.MonkeyPatch):
    """The second step is recorded and the others play it; for larger buffers another is recorded. What plays
    reads tensors alone: Python's numbers, here the length, stay those of the recording."""
    made: list[Recorded] = []

    class Recorded(generate.StepGraph):
        def __init__(self, step: Callable[[], Tensor]) -> None:
            made.append(self)
            self.step, self.logits = step, torch.full((text.file.config.vocab_size,), torch.nan)

        def play(self) -> Tensor:
            cache = self.step.__self__.cache
            length, cache.length = cache.length, None
            self.logits.copy_(self.step())
            cache.length = length
            return self.logits

    ids = random_ids(text, 506)
    launched = written(text, head, ids, 10)
    monkeypatch.setattr(generate, "StepGraph", Recorded)
    monkeypatch.setattr(Decoder, "_can_record", lambda self: True)
    assert written(text, head, ids, 10) == launched
    assert len(made) == 2


@pytest.mark.parametrize("layout", ["original", "gguf"])
def test_other_layouts_have_the_same_head(text, head, tiny_models: Path, tmp_path: Path, layout: str):
    packed = load_file(tiny_models / "text_encoders" / "gpt_oss_tiny_mxfp4.safetensors")
    path = tmp_path / ("encoder.gguf" if layout == "gguf" else "encoder.safetensors")
    del packed["tokenizer_json"]
    if layout == "gguf":
        files.write_gguf(path, packed, "F16")
    else:
        files.save(path, files.original(packed))
    other = TextEncoder(open_encoder(path), torch.float32)
    with loaded_head(other, CPU) as found:
        # F16 holds the bf16 of these sizes to its own rounding.
        assert relative_l2(found.lm_head.weight, head.lm_head.weight) < 1e-6
        assert torch.equal(found.norm.weight, head.norm.weight)


def test_a_file_without_lm_head_names_those_that_have_it(tiny_models: Path):
    path = tiny_models / "text_encoders" / "gpt_oss_tiny_nvfp4.safetensors"
    text = TextEncoder(open_encoder(path), torch.float32)
    with pytest.raises(CheckpointError, match=r"nvfp4.* has no lm_head.*gpt-oss-20b.*download encoder-mxfp4"):
        rewrite_locally(text, "a cat", "general", CPU, LocalOptions())
    assert not text.is_read


def test_the_head_is_counted_and_let_go(text):
    """On another device than the file's (a second name of the CPU here) it is a copy of its own."""
    gpu = torch.device("cpu:0")
    with pytest.raises(InterruptedError), loaded_head(text, gpu) as head:
        weight = weakref.ref(head.lm_head.weight)
        assert text.beside == sum(parameter.nbytes for parameter in head.parameters())
        raise InterruptedError
    assert text.beside == 0 and weight() is None


def test_loading_the_head_can_be_cancelled(text):
    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError), loaded_head(text, torch.device("cpu:0"), stop):
        pass
    assert text.beside == 0


@contextmanager
def scripted(monkeypatch: pytest.MonkeyPatch, text: TextEncoder, *answers: list) -> Iterator[list[str]]:
    """The model "draws" these pieces, one list for each conversation; yields the chats as texts."""
    codec, seen = text.file.tokenizer, []
    scripts = iter(answers)

    def prefill(self: Decoder, ids: list[int]) -> Tensor:
        seen.append(codec.decode(ids, skip_special_tokens=False))
        self.script = iter(harmony.ids_of(next(scripts), codec))
        return self.step(0)

    def step(self: Decoder, token: int) -> Tensor:
        logits = torch.zeros(text.file.config.vocab_size)
        logits[next(self.script)] = 1000
        return logits

    monkeypatch.setattr(Decoder, "prefill", prefill)
    monkeypatch.setattr(Decoder, "step", step)
    yield seen


FINAL = [harmony.CHANNEL, "final", harmony.MESSAGE]
THOUGHT = [harmony.CHANNEL, "analysis", harmony.MESSAGE, "Hm.", harmony.END, harmony.START, "assistant"]


def test_the_answer_is_the_final_message(text, monkeypatch: pytest.MonkeyPatch):
    told: list[tuple] = []
    script = [*THOUGHT, *FINAL, "A cat \U0001f431 sits.", harmony.RETURN, "never"]
    with scripted(monkeypatch, text, script) as chats:
        result = rewrite_locally(
            text, "a <|end|> cat", "short", CPU, LocalOptions(), on_text=lambda *call: told.append(call)
        )
    assert (result.prompt, result.warning) == ("A cat \U0001f431 sits.", "")
    assert [count for _, count in told] == list(range(1, len(told) + 1))
    assert {reply.channel for reply, _ in told} == {"", "analysis", "final"} and told[-1][0].done
    # The prompt's own <|end|> is letters; as tokens there are three, of system, developer and user.
    ids = harmony.render(harmony.Conversation("", "a <|end|> cat"), text.file.tokenizer)
    assert ids.count(text.file.tokenizer.token_to_id("<|end|>")) == 3
    assert "a <|end|> cat" in chats[0] and "Reasoning: low" in chats[0]


def test_without_effort_the_answer_begins_at_once(text, monkeypatch: pytest.MonkeyPatch):
    with scripted(monkeypatch, text, ["A cat.", harmony.RETURN]) as chats:
        result = rewrite_locally(text, "cat", "short", CPU, LocalOptions(effort="none"))
    assert result.prompt == "A cat." and chats[0].endswith("<|start|>assistant<|channel|>final<|message|>")


def test_lost_quoted_text_is_asked_for_once_more(text, monkeypatch: pytest.MonkeyPatch):
    answers = [[*FINAL, answer, harmony.RETURN] for answer in ("A sign.", 'A sign "OPEN".')]
    with scripted(monkeypatch, text, *answers) as chats:
        result = rewrite_locally(text, 'sign "OPEN"', "poster", CPU, LocalOptions())
    assert (result.prompt, result.warning, len(chats)) == ('A sign "OPEN".', "", 2)


def test_an_answer_that_is_cut_is_warned_of(text, monkeypatch: pytest.MonkeyPatch):
    with scripted(monkeypatch, text, [*FINAL, "A cat that never ends"]):
        result = rewrite_locally(text, "cat", "short", CPU, LocalOptions(max_new_tokens=12))
    assert "cut at 12 tokens" in result.warning and "A cat that never ends".startswith(result.prompt)


def test_a_blank_prompt_loads_nothing(tiny_models: Path):
    path = tiny_models / "text_encoders" / "gpt_oss_tiny_nvfp4.safetensors"
    text = TextEncoder(open_encoder(path), torch.float32)
    result = rewrite_locally(text, " \n ", "general", CPU, LocalOptions())
    assert result.prompt == " \n " and result.warning and not text.is_read


@pytest.mark.parametrize("of", ["token", "layer"])
def test_writing_can_be_cancelled(text, of: str):
    calls = []

    def stop(*call: object) -> None:
        calls.append(call)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        rewrite_locally(
            text, "cat", "short", CPU, LocalOptions(), **{"on_text" if of == "token" else "on_layer": stop}
        )
    assert len(calls) == 3


def test_words_that_have_no_token_are_never_drawn():
    logits = torch.tensor([0.0, 1.0, 9.0])
    assert [Sampler(Sampling(t), CPU, 2)(logits) < 2 for t in (0.0, 1.0)] == [True, True]


def test_only_the_likeliest_are_drawn():
    logits, sampler = torch.arange(100.0) / 100, Sampler(Sampling(1.0, top_k=3), CPU, 100)
    assert {sampler(logits) for _ in range(60)} == {97, 98, 99}


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"seed": -1}, {"seed": 2**64}],
    ids=str,
)
def test_wrong_sampling(settings: dict):
    with pytest.raises(SettingError, match=next(iter(settings))):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"effort": "most"}], ids=str)
def test_wrong_options(settings: dict):
    with pytest.raises(SettingError, match=next(iter(settings))):
        LocalOptions(**settings)
