"""The nano models' tokenizer: byte-level BPE like GPT-OSS's, with merges learnt from captions and template.

Words to be drawn are kept out of the text that merges are learnt from, so they reach the encoder letter by
letter, and a word never seen can be spelt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lens_core import harmony
from lens_core.prompt.template import INSTRUCTIONS, THOUGHT
from lens_core.tiny.tokenizer import SPECIALS

from .captions import caption
from .configs import VOCABULARY
from .scenes import sample_scene

_QUOTED = re.compile(r'"[^"]*"')


def train_tokenizer(captions: int = 20_000, seed: int = 0) -> Tokenizer:
    """The same tokenizer for the same ``seed``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(captions, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return tokenizer


def run_tokenizer(run: Path) -> str:
    """The tokenizer of a run's folder as JSON; made where there is none yet."""
    path = run / "tokenizer.json"
    if not path.exists():
        path.write_text(train_tokenizer().to_str(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _texts(captions: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    system = harmony.system("medium", date="{date}")
    for _ in range(captions // 100):
        yield from (system, INSTRUCTIONS, THOUGHT)
        for _ in range(100):
            yield _QUOTED.sub('""', caption(sample_scene(rng), rng))
