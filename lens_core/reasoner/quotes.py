"""Text to be drawn: what stands in quotation marks in a prompt, and whether an answer kept it.

An apostrophe is no quotation mark, nor are the marks of feet and inches: a straight mark opens only where
no letter or digit stands before it.
"""

from __future__ import annotations

import re

# Chinese and Japanese put no space before a mark, so their letters are not among these.
_LETTER = "0-9A-Za-z\u00c0-\u024f\u0370-\u052f"
# An apostrophe may look like an opening mark, after which the whole prompt would be searched for an end.
_LONGEST = 300
_MARKS = "\"'“”„‟«»‹›「」『』‘’‚"
_QUOTED = re.compile(
    "|".join(
        (
            rf'(?<![{_LETTER}])"([^"]+)"',
            "„([^„“”]+)[“”]",
            "“([^“”]+)”",
            "«([^«»]+)»",
            "»([^«»]+)«",
            "‹([^‹›]+)›",
            "「([^「」]+)」",
            "『([^『』]+)』",
            rf"‚([^‚‘\n]+)‘(?![{_LETTER}])",
            rf"‘([^‘\n]{{1,{_LONGEST}}}?)’(?![{_LETTER}])",
            rf"(?<![{_LETTER}])'([^\n]{{1,{_LONGEST}}}?)'(?![{_LETTER}])",
        )
    )
)


def quoted(prompt: str) -> list[str]:
    """The texts in quotation marks, each once, in their order; blank ones are none."""
    texts = (next(filter(None, match.groups())) for match in _QUOTED.finditer(prompt))
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def missing(prompt: str, answer: str) -> list[str]:
    """Of the prompt's quoted texts those that the answer does not hold letter for letter in quotation marks.

    The kind of the marks is free, and so is white space where the text has some.
    """
    return [text for text in quoted(prompt) if not _pattern(text).search(answer)]


def _pattern(text: str) -> re.Pattern[str]:
    words = r"\s+".join(map(re.escape, text.split()))
    return re.compile(rf"[{_MARKS}]\s*{words}\s*[{_MARKS}]")
