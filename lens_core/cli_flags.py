"""The flags of ``python -m lens_core generate``, each with its default, and those that others share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .config import PLACEMENTS
from .denoiser import DEFAULT_THRESHOLD, NAG_OFF, STEP_CACHE_OFF
from .interval import WHOLE
from .loading import DTYPES
from .memory.plan import OFFLOADS
from .quant.policy import CHOICES, NONE
from .reasoner import PRESETS
from .reasoner.local import EFFORTS
from .sampling import ASPECT_RATIOS, BASE_RESOLUTIONS

OFF = "off"
# The denoiser's own choice, and what must be installed first.
ATTENTIONS = ("auto", "flash_attn3")
LOCAL, API = "local", "api"
REASONERS = (NONE, LOCAL, API)
ERROR, ORIGINAL = "error", "original"
REASONER_FAILURES = (ERROR, ORIGINAL)


def add_generate(commands: Any, device: str) -> None:
    """Add the command to ``argparse``'s sub-parsers; ``device`` is the default one."""
    generate = commands.add_parser(
        "generate", help="make pictures", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = generate.add_argument
    add("--repo_id", required=True, metavar="PATH", help="a Lens folder in diffusers' layout")
    other = "take it from this file or folder instead, for example another Lens folder"
    add("--text_encoder", type=Path, metavar="PATH", help=other)
    add("--vae", type=Path, metavar="PATH", help=other)
    add("--prompt", required=True, help="what to draw; several prompts are joined by |")
    add("--negative_prompt", default="", help="what to avoid (at cfg 1: see --nag_scale)")
    away = "at cfg 1, how far attention is moved away from the negative prompt, 4 for example; 0: not at all"
    add("--nag_scale", type=float, default=NAG_OFF.scale, metavar="SCALE", help=away)
    bases = f"one of {BASE_RESOLUTIONS}; 256 is for the nano model"
    add("--base_resolution", type=int, default=1440, help=bases)
    add("--aspect_ratio", default="1:1", help=f"width:height, one of {', '.join(ASPECT_RATIOS)}")
    add("--height", type=int, default=None, help="with --width: a size outside the buckets")
    add("--width", type=int, default=None, help="with --height: a size outside the buckets")
    add("--steps", type=int, default=None, help="denoising steps; None: the checkpoint's own")
    add("--cfg", type=float, default=None, help="guidance scale; None: the checkpoint's own")
    add("--n", type=int, default=1, help="pictures per prompt")
    add("--seed", type=int, default=None, help="None: a new one each time, written into the PNG")
    add("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)}")
    add("--device", default=device, help="where to compute")
    add("--out", type=Path, default=Path("outputs"), help="folder for the pictures")
    add_lora_flag(generate)
    _add_saving_flags(generate)
    _add_speed_flags(generate)
    _add_memory_flags(generate)
    _add_encoder_flags(generate)
    _add_reasoner_flags(generate)


def add_lora_flag(parser: argparse.ArgumentParser) -> None:
    """``--lora``, once for each LoRA."""
    text = "a LoRA for Lens and its strength (without one: 1), merged into the denoiser; once for each"
    parser.add_argument("--lora", action="append", default=[], metavar="FILE:STRENGTH", help=text)


def _add_saving_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("fewer evaluations, other pictures").add_argument
    part = "guide in this part of the steps alone, e.g. 0.1 0.8 (step i of n is at i / n)"
    whole = (WHOLE.start, WHOLE.end)
    add("--guidance_interval", type=float, nargs=2, default=whole, metavar=("START", "END"), help=part)
    skip = f"leave out most of a step that changes less than this, e.g. {DEFAULT_THRESHOLD}; 0: of none"
    add("--step_cache", type=float, default=STEP_CACHE_OFF.threshold, metavar="THRESHOLD", help=skip)


def _add_speed_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("speed").add_argument
    graphs = "record the denoiser's launches once and play them: faster where the GPU waits for the CPU"
    add("--cuda_graphs", action="store_true", help=graphs)
    add("--attention", default="auto", help=f"the denoiser's, one of {', '.join(ATTENTIONS)}")
    smaller = f"quantise the denoiser's weights, one of {', '.join(CHOICES)}; auto: if the GPU needs it"
    add("--quant_transformer", default=NONE, metavar="MODE", help=smaller)


def _add_memory_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("GPU memory").add_argument
    meaning = (
        f"what leaves the GPU, one of {', '.join(OFFLOADS)}; auto: as little as fits, none: nothing, model "
        "(or the flag alone): each component after its part, stream: that, and layers come one by one"
    )
    add("--offload", nargs="?", const="model", default="auto", metavar="MODE", help=meaning)
    add("--vram_budget", type=float, default=None, metavar="GB", help="use no more of the GPU than this")


def _add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("text encoder").add_argument
    dense = "unpack the experts to bf16 once; needs about 45 GB for the encoder"
    add("--disable_mxfp4", action="store_true", help=dense)
    add("--encoder_placement", default="auto", help=f"where its layers lie, one of {', '.join(PLACEMENTS)}")
    kept = f"keep text features here, so that a prompt is encoded once; {OFF}: nowhere"
    add("--feature_cache", default=default_cache(), metavar="DIR", help=kept)
    add("--extended_prompt", action="store_true", help="do not cut prompts above 393 tokens (untrained)")
    date = "date in the prompt's template: pinned, today (as the published script) or YYYY-MM-DD"
    add("--template_date", default="pinned", help=date)


def _add_reasoner_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("reasoner: rewrites prompts before they are drawn").add_argument
    who = f"one of {', '.join(REASONERS)}; local: the text encoder's own weights, api: a server"
    add("--reasoner", default=NONE, metavar="WHO", help=who)
    add("--reasoner_preset", default="general", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    effort = f"how much local reasons before it writes, one of {', '.join(EFFORTS)}"
    add("--reasoner_effort", default="low", metavar="NAME", help=effort)
    failure = f"without an answer, one of {', '.join(REASONER_FAILURES)}; original: draw the prompt as it is"
    add("--reasoner_failure", default=ERROR, metavar="WHAT", help=failure)
    url = "a server that speaks OpenAI's API; None: OPENAI_BASE_URL of the environment, or OpenAI's"
    add("--api_url", default=None, metavar="URL", help=url)
    add("--api_model", default=None, metavar="NAME", help="the model's name on the server")
    key = "variable that holds the key; None: OPENAI_API_KEY, for the environment's own server alone"
    add("--api_key_env", default=None, metavar="VARIABLE", help=key)
    add("--api_timeout", type=float, default=60.0, metavar="SECONDS", help="how long to wait for an answer")


def default_cache() -> str:
    """Folder of kept text features below the user's cache folder; "off" for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rule: a relative path there is ignored.
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return str(Path(base, "lens", "features")) if os.path.isabs(base) else OFF
