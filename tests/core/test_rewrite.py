"""Presets, quoted text that must survive, and one second try."""

from __future__ import annotations

import pytest

from lens_core.errors import ReasonerError, SettingError
from lens_core.harmony import Conversation
from lens_core.reasoner import PRESETS, missing, quoted, request, rewrite


class Answers:
    """Gives the texts one after the other, and keeps what it was asked; an exception is raised."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, conversation: Conversation) -> str:
        self.asked.append(conversation)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_presets():
    assert list(PRESETS) == ["general", "photo", "poster", "diagram", "short", "caption"]
    assert len({*PRESETS.values()}) == len(PRESETS)
    for text in PRESETS.values():
        assert "language of the request" in text and "letter for letter" in text


def test_an_unknown_preset():
    with pytest.raises(SettingError, match="preset must be one of general, photo"):
        request("poem", "a fox")


QUOTED = {
    'a sign "OPEN" and a "SALE" and "OPEN" again': ["OPEN", "SALE"],
    "the dogs' bowl says 'REX' and it isn't his": ["REX"],
    "“Don’t” and ‘it’s’ and „Hallo“ and ‚ja‘": ["Don’t", "it’s", "Hallo", "ja"],
    "«да» »nein« ‹oui›": ["да", "nein", "oui"],
    '写着"你好"的牌子「営業中」『本』': ["你好", "営業中", "本"],
    'a 5" nail, a 24"x36" poster says "SALE"': ["SALE"],
    "6' tall and 5' wide": [],
    '"two\nlines"': ["two\nlines"],
    '"" " " plain': [],
    'an open end "here': [],
    'שלט "שלום" ثعلب "مرحبا" 👩‍👧 "🎉 Party"': ["שלום", "مرحبا", "🎉 Party"],
    "": [],
}


@pytest.mark.parametrize("prompt", QUOTED, ids=range(len(QUOTED)))
def test_what_is_quoted(prompt: str):
    assert quoted(prompt) == QUOTED[prompt]
    assert missing(prompt, prompt) == []
    assert missing(prompt, "nothing") == QUOTED[prompt]


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("reads “Open 24 h”", True),
        ("reads 'Open 24\nh' here", True),
        ('reads "OPEN 24 H"', False),
        ('reads "Open 24 h."', False),
        ('reads "We Open 24 h daily"', False),
        ("reads Open 24 h", False),
        ('an unpaired " mark, then "Open 24 h"', True),
    ],
)
def test_kept_is_letter_for_letter_in_any_marks(answer: str, kept: bool):
    assert missing('a door, "Open 24 h"', answer) == ([] if kept else ["Open 24 h"])


@pytest.mark.parametrize("mark", "\"'“„«‘‚")
def test_thousands_of_marks_without_an_end_are_soon_read(mark: str):
    """Each is looked for an end of: to the end of such a text it would take minutes."""
    quoted(f" {mark}a" * 50_000)


def test_an_answer_that_keeps_the_quotes_is_taken_at_once():
    answers = Answers(' A door with "OPEN"\n\nabove it. ')
    assert rewrite('door "OPEN"', "short", answers).prompt == 'A door with "OPEN" above it.'
    assert answers.asked == [request("short", 'door "OPEN"')]


def test_lost_quotes_are_asked_for_once_more():
    answers = Answers("A door.", 'A door with "OPEN" and "24 h".')
    result = rewrite('door "OPEN" "24 h"', "short", answers)
    assert (result.prompt, result.warning) == ('A door with "OPEN" and "24 h".', "")
    first, second = answers.asked
    assert second.prompt == first.prompt
    assert second.instructions.startswith(first.instructions)
    assert second.instructions.endswith('"OPEN"\n"24 h"')


@pytest.mark.parametrize(
    ("second", "prompt", "lost"),
    [
        ("Nothing.", "One.", '"A", "B".'),
        ('Has "A".', 'Has "A".', '"B".'),
        ("", "One.", '"A", "B".'),
        (ReasonerError("gone"), "One.", '"A", "B".'),
    ],
)
def test_what_is_lost_twice_is_a_warning(second, prompt: str, lost: str):
    result = rewrite('"A" and "B"', "short", Answers("One.", second))
    assert result.prompt == prompt
    assert result.warning == f"Quoted text of the prompt is not in the answer: {lost}"


@pytest.mark.parametrize("prompt", ["", "  \n\t", "\u3000"])
def test_a_blank_prompt_is_not_sent(prompt: str):
    result = rewrite(prompt, "general", Answers())
    assert result.prompt == prompt
    assert "blank" in result.warning


@pytest.mark.parametrize("answers", [[""], ["", ""]])
def test_an_empty_answer_leaves_the_prompt(answers: list[str]):
    result = rewrite("a fox", "general", Answers(*answers))
    assert result.prompt == "a fox"
    assert "empty" in result.warning


def test_an_empty_answer_to_a_prompt_with_quotes_is_asked_for_once_more():
    assert rewrite('"A"', "short", Answers("", 'An "A".')).prompt == 'An "A".'
