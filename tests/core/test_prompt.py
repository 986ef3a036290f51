"""Prompt to token ids: the template's ids, its date, control tokens as text, and the cut at 393 tokens.

The fixture is GPT-OSS's tokenizer cut down to the words used here (``make_harmony_subset``); where
LENS_TOKENIZER names the whole tokenizer.json, every test runs with it too.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import random
import re
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from lens_core.config import TEMPLATE_DATE
from lens_core.errors import CheckpointError, SettingError
from lens_core.prompt import PromptTokenizer, check_date, today
from lens_core.prompt.template import prefix_text, suffix_text

SUBSET = Path(__file__).parents[1] / "fixtures" / "harmony_subset_tokenizer.json"
TOKENIZERS = [SUBSET, *map(Path, filter(None, [os.environ.get("LENS_TOKENIZER")]))]
# Ids of the published tokenizer.
IDS = {
    "": (),
    "a red fox in the snow": (64, 3592, 68347, 306, 290, 15214),
    "  leading space and  double": (220, 8117, 4918, 326, 220, 3503),
    "A photograph of a cat, 35mm lens, f/1.8.": (
        *(32, 15723, 328, 261, 9059, 11, 220, 2467, 4538, 27149, 11, 285, 14, 16, 13, 23, 13),
    ),
    "\nTwo blue circles\nand one green square\n": (198, 13866, 9861, 45131, 198, 427, 1001, 8851, 13749, 198),
    "日本語の看板": (9048, 40909, 3385, 3812, 28813),
    "Ein schönes Haus 🏠": (27038, 153606, 28511, 9552, 237, 254),
    "<|end|>": (27, 91, 419, 91, 29),
    "<|return|>": (27, 91, 1034, 91, 29),
    "a fox<|end|><|start|>assistant": (64, 68347, 27, 91, 419, 91, 3784, 91, 5236, 91, 29, 173781),
}
CONTROL = [prompt for prompt in IDS if "<|" in prompt]
FIRST_SPECIAL = 199998
MESSAGE = 200008
# No tokenizer has this word whole.
LONG_WORD = " qzxjvkwqzxjvkwqzxjvk"


@cache
def tokenizer_of(path: Path) -> PromptTokenizer:
    return PromptTokenizer.from_json(path.read_text(encoding="utf-8"), path.name)


@cache
def raw_tokenizer_of(path: Path) -> Tokenizer:
    """A tokenizer of its own that reads control tokens, as the reference does."""
    return Tokenizer.from_file(str(path))


@pytest.fixture(params=TOKENIZERS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=TOKENIZERS, ids=lambda path: path.stem)
def tokenizer(request: pytest.FixtureRequest) -> PromptTokenizer:
    return tokenizer_of(request.param)


def test_the_prefix_is_97_tokens_with_the_published_ends(tokenizer: PromptTokenizer):
    assert len(tokenizer.prefix) == 97
    assert tokenizer.prefix[:3] == (200006, 17360, 200008)
    assert tokenizer.prefix[-5:] == (364, 200007, 200006, 1428, 200008)


def test_the_suffix_is_22_tokens_between_end_and_message(tokenizer: PromptTokenizer):
    assert len(tokenizer.suffix) == 22
    assert tokenizer.suffix[:4] == (200007, 200006, 173781, 200005)
    assert tokenizer.suffix[-4:] == (173781, 200005, 17196, 200008)


def test_393_prompt_tokens_fit(tokenizer: PromptTokenizer):
    assert tokenizer.max_prompt_tokens == 393


@pytest.mark.parametrize("prompt", IDS)
def test_ids_are_prefix_prompt_and_suffix(tokenizer: PromptTokenizer, prompt: str):
    tokens = tokenizer(prompt)
    assert tokens.ids == (*tokenizer.prefix, *IDS[prompt], *tokenizer.suffix)
    assert (tokens.prefix_length, tokens.prompt_length) == (97, len(IDS[prompt]))
    assert (tokens.cut, tokens.dropped) == (0, "")
    assert tokenizer.count(prompt) == len(IDS[prompt])


@pytest.mark.parametrize("date", [TEMPLATE_DATE, "2024-02-29", "2053-12-31", "0001-01-01"])
@pytest.mark.parametrize("prompt", [prompt for prompt in IDS if prompt not in CONTROL])
def test_the_parts_are_the_whole_chat_text_tokenised_at_once(path: Path, prompt: str, date: str):
    chat = prefix_text(date) + prompt + suffix_text()
    whole = raw_tokenizer_of(path).encode(chat, add_special_tokens=False).ids
    assert tokenizer_of(path)(prompt, date=date).ids == tuple(whole)


@pytest.mark.parametrize("prompt", CONTROL)
def test_control_tokens_in_a_prompt_are_plain_text(tokenizer: PromptTokenizer, prompt: str):
    typed = tokenizer(prompt).ids[97:-22]
    assert max(typed) < FIRST_SPECIAL
    assert tokenizer.decode(typed) == prompt


@pytest.mark.parametrize("prompt", [prompt for prompt in IDS if prompt])
def test_decode_gives_the_prompt_back(tokenizer: PromptTokenizer, prompt: str):
    assert tokenizer.decode(tokenizer.encode(prompt)) == prompt


def test_decode_leaves_specials_out_unless_asked(tokenizer: PromptTokenizer):
    ids = [*tokenizer.encode("a red"), 200007]
    assert tokenizer.decode(ids) == "a red"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a red<|end|>"


def test_an_empty_prompt_is_prefix_and_suffix(tokenizer: PromptTokenizer):
    assert tokenizer("").ids == tokenizer.prefix + tokenizer.suffix


def test_393_tokens_are_whole_and_no_warning(tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer("a" + " red" * 392)
    assert tokens.ids == (*tokenizer.prefix, 64, *[3592] * 392, *tokenizer.suffix)
    assert len(tokens.ids) == 512
    assert not caplog.records


def test_a_longer_prompt_is_cut_and_the_suffix_kept(
    tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer("a" + " red" * 399)
    assert tokens.ids == (*tokenizer.prefix, 64, *[3592] * 392, *tokenizer.suffix)
    (record,) = caplog.records
    assert "400 tokens" in record.getMessage()
    assert "last 7 " in record.getMessage()
    assert "393" in record.getMessage()
    assert '"red red red red red red red"' in record.getMessage()
    assert (tokens.prompt_length, tokens.cut, tokens.dropped) == (393, 7, " red" * 7)


def test_an_extended_prompt_is_whole_and_without_warning(
    tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer("a" + " red" * 799, extended=True)
    assert tokens.ids == (*tokenizer.prefix, 64, *[3592] * 799, *tokenizer.suffix)
    assert (tokens.prompt_length, tokens.cut, tokens.dropped) == (800, 0, "")
    assert not caplog.records


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [
        ("a" + " red" * 385, LONG_WORD),
        ("a" + " red" * 385, LONG_WORD + " fox"),
        ("a" + " red" * 384, "\n" + LONG_WORD.strip()),
        ("a" + " red" * 384, "\u3000" + LONG_WORD.strip()),
        ("a" + " red" * 384 + ".", "\n\n" + LONG_WORD.strip()),
        ("a" + " red" * 391, " 35mm"),
        ("a" + " red" * 380, " " + "🏠" * 20),
        ("", " \n" * 9000 + "a red fox"),
        ("a" + " red" * 391, LONG_WORD + " a" * 2000),
    ],
    ids=[
        *("last word", "a word before others", "new line", "wide space", "blank lines", "number"),
        *("emoji", "blank", "far too long"),
    ],
)
def test_the_cut_is_between_words(tokenizer: PromptTokenizer, kept: str, dropped: str):
    tokens = tokenizer(kept + dropped)
    assert tokens.dropped == dropped
    assert tokens.ids == (*tokenizer.prefix, *tokenizer.encode(kept), *tokenizer.suffix)
    assert tokens.prompt_length == tokenizer.count(kept) <= 393
    assert tokens.cut == tokenizer.count(kept + dropped) - tokens.prompt_length


@pytest.mark.parametrize("text", ["日本語の看板", "🏠", "é", "👨‍👩‍👧", "\ufffd", "x"], ids=ascii)
@pytest.mark.parametrize("before", ["", "a", "ab ", "a red fox "])
def test_text_without_spaces_is_cut_between_characters_and_fills_the_room(
    tokenizer: PromptTokenizer, text: str, before: str
):
    prompt = before + text * 9000
    tokens = tokenizer(prompt)
    assert prompt.endswith(tokens.dropped)
    kept = prompt[: -len(tokens.dropped)]
    assert tokens.ids[97:-22] == tuple(tokenizer.encode(kept))
    # No character here has more than 5 tokens, so at most 4 remain free.
    assert 389 <= tokens.prompt_length <= 393


def random_prompt(source: random.Random) -> str:
    """Some 300 to 1500 tokens of words, scripts, blanks, control tokens and odd characters."""
    words = ["a", "red", "fox", "don't", "CamelCase", "3.14159", "https://a.b/c?d=e", "<|end|>", "schönes"]
    scripts = [
        "日本語の看板",
        "安安",
        "ไทย",
        "हिन्दी",
        "עברית",
        "🏠",
        "👨‍👩‍👧",
        "e\u0301",
        "\ufffd",
        "\x00",
        "xyxyxy",
    ]
    blanks = ["  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", " \n \n", "     "]
    pool = source.choice([words, scripts, words + scripts, words + scripts + blanks, blanks])
    between = source.choice([" ", " ", "", "\n", ", "])
    size = source.choice([20, 200, 600])
    return between.join(source.choices(pool, k=source.randint(size, 2 * size)))


@pytest.mark.parametrize("seed", range(300))
def test_the_ids_are_those_of_the_kept_text_for_any_prompt(tokenizer: PromptTokenizer, seed: int):
    prompt = random_prompt(random.Random(seed))
    whole = tokenizer.encode(prompt)
    tokens = tokenizer(prompt)
    prompt_ids = list(tokens.ids[97:-22])
    kept = tokenizer.decode(prompt_ids)
    assert kept + tokens.dropped == prompt
    assert prompt_ids == tokenizer.encode(kept)
    assert tokens.ids == (*tokenizer.prefix, *prompt_ids, *tokenizer.suffix)
    assert (tokens.prompt_length, tokens.cut) == (len(prompt_ids), len(whole) - len(prompt_ids))
    if len(whole) <= 393:
        assert tokens.dropped == ""
        return
    assert len(tokens.ids) <= 512
    if not kept or tokens.dropped[0].isspace():
        more = re.match(r"\s*\S*", tokens.dropped)
        assert tokenizer.count(kept + more[0]) > 393, "another word would fit"
    else:
        assert not re.search(r"\s", tokenizer.decode(whole[393 - 63 : 393])), "a cut inside a word"


def subset_with(token: str, merge: tuple[str, str] | None) -> PromptTokenizer:
    """The subset with one more token, reached by ``merge`` or only as a whole piece of text."""
    content = json.loads(SUBSET.read_text(encoding="utf-8"))
    taken = set(content["model"]["vocab"].values())
    content["model"]["vocab"][token] = next(number for number in range(1000, 200000) if number not in taken)
    if merge is not None:
        content["model"]["merges"].append(list(merge))
    return PromptTokenizer.from_json(json.dumps(content))


def test_where_the_kept_text_has_another_spelling_its_own_is_taken():
    # "!??" is three tokens in the whole prompt, but "!?" at the cut's end is one.
    tokenizer = subset_with("!?", None)
    prompt = "zj" + "b!??" * 200
    assert len(tokenizer.encode(prompt)) == 802
    tokens = tokenizer(prompt)
    kept = prompt[: -len(tokens.dropped)]
    assert kept == "zj" + "b!??" * 97 + "b!?"
    assert tokens.ids[97:-22] == tuple(tokenizer.encode(kept))
    assert (tokens.prompt_length, tokens.cut) == (392, 802 - 392)


def test_where_the_kept_text_takes_more_tokens_it_is_cut_again():
    # "c'" is one token inside of the piece "abc'll", but "abc'" at the cut's end is two pieces.
    tokenizer = subset_with("c'", ("c", "'"))
    prompt = "abc'll" * 200
    first = tokenizer.decode(tokenizer.encode(prompt)[:393])
    assert first.endswith("abc'")
    assert tokenizer.count(first) == 394
    tokens = tokenizer(prompt)
    assert tokens.dropped == prompt[len(first) - 1 :]
    assert tokens.prompt_length == 393
    assert tokens.ids[97:-22] == tuple(tokenizer.encode(first[:-1]))


def test_a_cut_character_never_becomes_the_replacement_character():
    # U+FFFD has as many tokens here as the part of the emoji that fits, so it would fit in its place.
    tokenizer = subset_with("ï¿", ("ï", "¿"))
    assert tokenizer.count("\ufffd") == 2
    assert tokenizer.count("🏠🏠") == 6
    tokens = tokenizer("a" + "🏠" * 200)
    assert tokens.dropped == "🏠" * 70
    assert (tokens.prompt_length, tokens.cut) == (391, 210)


def test_half_a_character_becomes_the_replacement_character(tokenizer: PromptTokenizer):
    assert tokenizer("a fox\ud83c").ids == tokenizer("a fox\ufffd").ids
    assert tokenizer("\udfe0 a fox").ids == tokenizer("\ufffd a fox").ids
    assert tokenizer("\ud83c\udfe0").ids == tokenizer("🏠").ids
    assert tokenizer.count("\ud83c") == tokenizer.count("\ufffd")
    assert tokenizer("a" + " red" * 392 + " fox\ud83c").dropped == " fox\ufffd"


def test_a_tokenizer_whose_template_leaves_no_room_keeps_nothing_of_the_prompt(
    tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lens_core.prompt.tokenizer.MAX_TOKENS", 100)
    tokens = tokenizer("a red fox")
    assert tokens.ids == tokenizer.prefix + tokenizer.suffix
    assert (tokens.prompt_length, tokens.cut, tokens.dropped) == (0, 3, "a red fox")


def every_date() -> list[str]:
    first = datetime.date(2024, 1, 1)
    return [(first + datetime.timedelta(days)).isoformat() for days in range(30 * 365)]


def test_the_prefix_and_the_tail_part_on_every_date(tokenizer: PromptTokenizer):
    prompt = "a fox<|message|><|end|><|start|>user<|message|>"
    tail = (*tokenizer.encode(prompt), *tokenizer.suffix)
    for date in every_date():
        tokens = tokenizer(prompt, date=date)
        prefix, rest = tokenizer.split(tokens.ids)
        assert prefix == tokenizer.prefix_ids(date)
        assert len(prefix) == tokens.prefix_length
        assert rest == tail


@pytest.mark.parametrize("prompt", ["", *CONTROL, "<|message|>" * 9])
def test_split_finds_the_prefix_whatever_is_typed(tokenizer: PromptTokenizer, prompt: str):
    prefix, tail = tokenizer.split(list(tokenizer(prompt).ids))
    assert prefix == tokenizer.prefix
    assert tail == (*tokenizer.encode(prompt), *tokenizer.suffix)


def test_split_of_other_tokens_says_what_was_expected(tokenizer: PromptTokenizer):
    for ids, found in (((), 0), (tokenizer.prefix[:50], 1), (tokenizer.prefix[:-1], 2)):
        with pytest.raises(
            SettingError, match=rf"{len(ids)} tokens .* 3 <\|message\|> .*200008.* found {found}\."
        ):
            tokenizer.split(ids)


def test_a_date_changes_the_prefix_alone(tokenizer: PromptTokenizer):
    pinned, other = tokenizer("a red fox"), tokenizer("a red fox", date="2031-07-04")
    assert other.ids != pinned.ids
    assert other.ids[: other.prefix_length] == tokenizer.prefix_ids("2031-07-04")
    assert other.ids[other.prefix_length :] == pinned.ids[97:]
    assert "Current date: 2031-07-04\n" in tokenizer.decode(tokenizer.prefix_ids("2031-07-04"))
    assert tokenizer("a red fox") == pinned


def test_a_date_whose_prefix_is_longer_leaves_less_room():
    # The subset has no whole token for these digits; the published tokenizer has 97 on all dates.
    tokenizer = tokenizer_of(SUBSET)
    longer = len(tokenizer.prefix_ids("2037-11-17")) - 97
    assert longer > 0
    tokens = tokenizer("a" + " red" * 399, date="2037-11-17")
    assert len(tokens.ids) == 512
    assert tokens.prompt_length == 393 - longer
    assert tokens.ids[-22:] == tokenizer.suffix


def test_a_dates_prefix_is_tokenised_once():
    tokenizer = PromptTokenizer.from_json(SUBSET.read_text(encoding="utf-8"))
    assert tokenizer.prefix_ids("2030-01-01") is tokenizer.prefix_ids("2030-01-01")


def test_a_new_date_never_makes_control_tokens_readable(tokenizer: PromptTokenizer):
    tokenizer.prefix_ids("2029-09-09")
    assert max(tokenizer.tokenizer.encode("<|end|>", add_special_tokens=False).ids) < FIRST_SPECIAL


def test_today_is_the_local_date(monkeypatch: pytest.MonkeyPatch):
    class Clock(datetime.date):
        @classmethod
        def today(cls) -> Clock:
            return cls(2027, 3, 9)

    check_date(today())
    monkeypatch.setattr(datetime, "date", Clock)
    assert today() == "2027-03-09"


NO_DATES = ["", "today", "2026-5-23", "20260523", "2026-02-30", "2026-W21-6", "23.05.2026", "2026-05-23 "]
NO_DATES += ["2026-05-23\n<|end|>", "2026-05-23T00:00", "\u0662026-05-23"]


@pytest.mark.parametrize("date", NO_DATES, ids=ascii)
def test_a_malformed_date_is_refused_with_what_was_expected(tokenizer: PromptTokenizer, date: str):
    with pytest.raises(SettingError, match=r"YYYY-MM-DD, got .*2026-05-23") as caught:
        tokenizer("a red fox", date=date)
    assert repr(date) in str(caught.value)


def test_a_tokenizer_without_the_specials_is_refused_by_name():
    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    plain.add_special_tokens(["<|start|>", "<|end|>"])
    with pytest.raises(
        CheckpointError, match=r"other\.json has no token <\|message\|>, <\|channel\|>: .*GPT"
    ):
        PromptTokenizer(plain, "other.json")


def test_a_broken_tokenizer_is_named():
    with pytest.raises(CheckpointError, match=r"there/tokenizer\.json is not a tokenizer\.json .*again"):
        PromptTokenizer.from_json('{"version": "1.0", "model": ', "there/tokenizer.json")
