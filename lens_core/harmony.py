"""GPT-OSS's chat format, harmony: conversations to token ids, and generated token ids to messages.

Control tokens are ids of their own, and text is always encoded without them: ``<|end|>`` in a prompt is
seven letters that nobody mistakes for the end of a message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from .config import TEMPLATE_DATE
from .errors import SettingError

EFFORTS = ("low", "medium", "high")
SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n"
    "Current date: {date}\n\n"
    "Reasoning: {effort}\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
DEVELOPER = "# Instructions\n\n{instructions}\n\n"
FINAL = "final"


class Control(str):
    """The name of a control token, told by its type from a text that looks the same."""


START, MESSAGE, END, CHANNEL = map(Control, ("<|start|>", "<|message|>", "<|end|>", "<|channel|>"))
RETURN, CALL, END_OF_TEXT = map(Control, ("<|return|>", "<|call|>", "<|endoftext|>"))
NEEDED = (START, MESSAGE, END, CHANNEL)
# <|end|> closes the analysis, after which the answer comes.
STOPS = (RETURN, CALL, END_OF_TEXT)
_CONTROLS = {str(control): control for control in (*NEEDED, *STOPS)}
_NAMES = re.compile("(" + "|".join(map(re.escape, _CONTROLS)) + ")")


class Codec(Protocol):
    """What harmony needs of a tokenizer; ``lens_core.prompt.PromptTokenizer`` is one."""

    def encode(self, prompt: str) -> list[int]:
        """Ids of plain text, in which control tokens are letters."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; U+FFFD for bytes that are no character."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a control token, if there is one."""


@dataclass(frozen=True)
class Conversation:
    """Instructions and one request, to which the assistant's answer is to be generated."""

    instructions: str
    prompt: str


class Reply(NamedTuple):
    """Where an answer is: the channel and so far the text of its last message; whether it has ended."""

    channel: str
    text: str
    done: bool


@dataclass
class Message:
    """A generated message; ``channel`` is analysis, commentary, final, or empty where none was named."""

    channel: str = ""
    text: str = ""


def valid_text(text: str) -> str:
    """``text`` with U+FFFD for halves of characters (lone surrogates), which have no UTF-8: a text box
    that counts in UTF-16 can leave such a half where it cuts an emoji."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def system(effort: str, date: str = TEMPLATE_DATE) -> str:
    """The system message; raises SettingError unless ``effort`` is one of EFFORTS."""
    if effort not in EFFORTS:
        raise SettingError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}.")
    return SYSTEM.format(date=date, effort=effort)


def message(role: str, text: str, channel: str = "") -> list[str]:
    """A whole message as pieces: controls and plain texts."""
    named = [CHANNEL, channel] if channel else []
    return [START, role, *named, MESSAGE, text, END]


def ids_of(pieces: Sequence[str], codec: Codec) -> list[int]:
    """Token ids of pieces: one for a Control, as many as it takes for a plain text."""
    ids: list[int] = []
    for piece in pieces:
        control = codec.token_to_id(piece) if isinstance(piece, Control) else None
        ids += codec.encode(piece) if control is None else [control]
    return ids


def render(conversation: Conversation, codec: Codec, effort: str = "low") -> list[int]:
    """Token ids up to where the assistant begins; what it generates goes to a Parser."""
    pieces = [
        *message("system", system(effort)),
        *message("developer", DEVELOPER.format(instructions=conversation.instructions)),
        *message("user", conversation.prompt),
        *(START, "assistant"),
    ]
    return ids_of(pieces, codec)


def stop_ids(codec: Codec) -> frozenset[int]:
    """Ids after which nothing is generated."""
    found = (codec.token_to_id(control) for control in STOPS)
    return frozenset(token for token in found if token is not None)


@dataclass
class _Reader:
    """Controls and texts in a row to messages; begins inside the assistant's header."""

    messages: list[Message] = field(default_factory=list)
    header: str = ""
    in_channel: bool = False
    in_text: bool = False
    done: bool = False

    def control(self, name: str) -> None:
        if name == START:
            self.header, self.in_channel, self.in_text = "", False, False
        elif name == CHANNEL:
            self.header, self.in_channel, self.in_text = "", True, False
        elif name == MESSAGE:
            # What may follow a channel's name is a recipient: "commentary to=functions.draw".
            words = self.header.split() if self.in_channel else []
            self.messages.append(Message(words[0] if words else ""))
            self.header, self.in_channel, self.in_text = "", False, True
        elif name == END:
            self.in_text = False
        else:
            self.in_text, self.done = False, True

    def add(self, text: str) -> None:
        if self.in_text:
            self.messages[-1].text += text
        else:
            self.header += text


class Parser:
    """Messages of what is generated after ``render``'s ids, fed one id at a time."""

    def __init__(self, codec: Codec) -> None:
        self._codec, self._reader = codec, _Reader()
        found = {codec.token_to_id(name): control for name, control in _CONTROLS.items()}
        self._controls = {token: control for token, control in found.items() if token is not None}
        self._pending: list[int] = []  # ids that end inside a character

    @property
    def messages(self) -> list[Message]:
        """Every message so far."""
        return self._reader.messages

    @property
    def answer(self) -> str:
        """Text of the last message of the channel final; empty if there is none yet."""
        return _last_final(self.messages)

    def feed(self, token: int) -> Reply:
        """Take the next id; ids after a stop are ignored."""
        reader = self._reader
        if not reader.done:
            control = self._controls.get(token)
            self._pending += [token] if control is None else []
            text = self._codec.decode(self._pending)
            # A character of several bytes may take several tokens.
            if control is not None or not text.endswith("\ufffd"):
                reader.add(text)
                self._pending = []
            if control is not None:
                reader.control(control)
        last = self.messages[-1] if self.messages else Message()
        return Reply(last.channel, last.text, reader.done)


def parse(ids: Sequence[int], codec: Codec) -> list[Message]:
    """The messages in ids that were generated after ``render``'s."""
    parser = Parser(codec)
    for token in ids:
        parser.feed(token)
    return parser.messages


def answer_in(text: str) -> str:
    """The final answer in a text that begins with harmony's control tokens written out, as some servers
    return it. Any other text is an answer, whatever stands in it."""
    if not text.lstrip().startswith((START, CHANNEL)):
        return text
    reader = _Reader()
    for piece in _NAMES.split(text):
        if piece in _CONTROLS:
            reader.control(piece)
        else:
            reader.add(piece)
    return _last_final(reader.messages)


def _last_final(messages: Sequence[Message]) -> str:
    return next((message.text for message in reversed(messages) if message.channel == FINAL), "")
