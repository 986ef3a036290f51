"""``generate --reasoner``: prompts rewritten before they are drawn."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .cli_flags import API, LOCAL, ORIGINAL, REASONER_FAILURES, REASONERS
from .errors import ReasonerError, SettingError
from .harmony import Conversation, Reply
from .pipeline import LensPipeline
from .reasoner import PRESETS, Rewritten, rewrite
from .reasoner.local import EFFORTS, LocalOptions
from .reasoner.remote import Generation, ask
from .reasoner.sampling import Sampling
from .reasoner.server import Server, check_server, default_url

log = logging.getLogger(__name__)


def check_reasoner(args: argparse.Namespace) -> None:
    """Raise SettingError for flags of the reasoner that cannot be; nothing is asked yet."""
    known = {
        "reasoner": REASONERS,
        "reasoner_preset": PRESETS,
        "reasoner_effort": EFFORTS,
        "reasoner_failure": REASONER_FAILURES,
    }
    for flag, names in known.items():
        given = getattr(args, flag)
        if given not in names:
            raise SettingError(f"--{flag} must be one of {', '.join(names)}, got {given}.")
    if args.reasoner == API:
        if args.api_model is None:
            raise SettingError("--reasoner api needs --api_model, the model's name on the server.")
        check_server(_server(args))


def rewritten(args: argparse.Namespace, prompts: Sequence[str], seed: int) -> list[str]:
    """The prompts to draw: as they are, or rewritten by a server if the flags ask for that.

    Raises ReasonerError where there is no answer, unless ``--reasoner_failure`` is original.
    """
    if args.reasoner != API:
        return list(prompts)
    server, generation = _server(args), Generation(seed)

    def answer(conversation: Conversation) -> str:
        return ask(server, conversation, generation)

    results = []
    for prompt in prompts:
        try:
            result = rewrite(prompt, args.reasoner_preset, answer)
        except ReasonerError as error:
            if args.reasoner_failure != ORIGINAL:
                raise
            result = Rewritten(prompt, f"{error} The prompt stays as it was.")
        results.append(_said(result))
    return results


def rewritten_by(
    pipeline: LensPipeline, args: argparse.Namespace, prompts: Sequence[str], seed: int
) -> list[str]:
    """The same, rewritten by the pipeline's text encoder if the flags ask for that."""
    if args.reasoner != LOCAL:
        return list(prompts)
    options = LocalOptions(Sampling(seed=seed), effort=args.reasoner_effort)
    results = []
    for prompt in prompts:
        with logging_redirect_tqdm(), tqdm(desc="Writing", unit="token", leave=False, disable=None) as bar:

            def count(reply: Reply, done: int, bar: tqdm = bar) -> None:
                bar.update(done - bar.n)

            results.append(_said(pipeline.rewrite(prompt, args.reasoner_preset, options, count)))
    return results


def _said(result: Rewritten) -> str:
    if result.warning:
        log.warning("%s", result.warning)
    log.info("Prompt: %s", result.prompt)
    return result.prompt


def reasoner_settings(args: argparse.Namespace, prompt: str, drawn: str) -> dict[str, str]:
    """What a PNG says of the reasoner: nothing where it changed nothing, and never the server's address."""
    if prompt == drawn:
        return {}
    how = {"api_model": args.api_model} if args.reasoner == API else {"reasoner_effort": args.reasoner_effort}
    return {
        "original_prompt": prompt,
        "reasoner": args.reasoner,
        "reasoner_preset": args.reasoner_preset,
        **how,
    }


def _server(args: argparse.Namespace) -> Server:
    return Server(args.api_url or default_url(), args.api_model, args.api_key_env, args.api_timeout)
