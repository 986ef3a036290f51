"""``--reasoner`` of ``generate``: prompts rewritten before anything is drawn."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .errors import SettingError
from .harmony import Reply
from .pipeline import LensPipeline
from .reasoner import PRESETS
from .reasoner.local import EFFORTS, LocalOptions
from .reasoner.sampling import Sampling

log = logging.getLogger(__name__)


def check_reasoner(args: argparse.Namespace) -> None:
    """Raise SettingError for settings of ``--reasoner`` that are not there."""
    for flag, value, known in (
        ("--reasoner_preset", args.reasoner_preset, PRESETS),
        ("--reasoner_effort", args.reasoner_effort, EFFORTS),
    ):
        if value not in known:
            raise SettingError(f"{flag} must be one of {', '.join(known)}, got {value}.")


def rewritten(
    args: argparse.Namespace, pipeline: LensPipeline, prompts: Sequence[str], seed: int
) -> list[str]:
    """The prompts to draw: as they are without ``--reasoner``, else rewritten, each said in a line."""
    if args.reasoner is None:
        return list(prompts)
    options = LocalOptions(Sampling(seed=seed), effort=args.reasoner_effort)
    results = []
    for prompt in prompts:
        with logging_redirect_tqdm(), tqdm(desc="Writing", unit="token", leave=False, disable=None) as bar:

            def count(reply: Reply, done: int, bar: tqdm = bar) -> None:
                bar.update(done - bar.n)

            result = pipeline.rewrite(prompt, args.reasoner_preset, options, count)
        if result.warning:
            log.warning("%s", result.warning)
        log.info("Prompt: %s", result.prompt)
        results.append(result.prompt)
    return results
