"""Trains the encoder, on text alone: ``python -m tools.nano.train_encoder --out RUN``.

It learns to predict the next token, as a language model, and to gather what the caption says: linear probes
read the main part, the other part, the background and the word from each captured layer at the template's
last tokens. The probes are thrown away; what they taught is in the features that the denoiser is given.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.config import CAPTURED_LAYERS
from lens_core.prompt.tokenizer import PromptTokenizer

from .configs import encoder_config
from .encoder import TrainedEncoder
from .feed import captions
from .properties import PROPERTIES
from .tokenizer import run_tokenizer
from .training import Curves, Masters, Recorded, rate_at, run_flags, save_checkpoint

NAMES = ("language", "told", "right, %", "gradient")
_LANGUAGE = 0.2


class Probes(nn.Module):
    """A linear layer for each captured layer and each of the last tokens."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        sizes = [sum(classes) for classes in PROPERTIES]
        self.weights = nn.ParameterList(
            torch.randn(len(CAPTURED_LAYERS), hidden, size) / hidden**0.5 for size in sizes
        )

    def forward(self, features: Tensor, real: Tensor) -> list[Tensor]:
        """Features [B, S, L, H], which tokens are real [B, S] -> logits [L, B, classes] of every property."""
        rows, last = torch.arange(len(real), device=real.device), real.sum(1) - 1
        found: list[Tensor] = []
        for back, (weight, classes) in enumerate(zip(self.weights, PROPERTIES, strict=True)):
            states = features[rows, last - back].float().transpose(0, 1)
            logits = F.rms_norm(states, states.shape[-1:]) @ weight
            found += logits.split(classes, dim=-1)
        return found


def losses(logits: Tensor, told: list[Tensor], tails: Tensor, real: Tensor, said: Tensor) -> Tensor:
    """Next tokens' cross-entropy, the properties' (their sum, mean over layers), and in % how many of these
    the probes have right, [3]; ``said`` [B, properties]."""
    wanted = tails[:, 1:].masked_fill(~real[:, 1:], -100)
    language = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten())
    each = torch.zeros_like(language)
    right = torch.zeros_like(language)
    for found, classes in zip(told, said.unbind(1), strict=True):
        expected = classes.expand(len(found), -1)
        each = each + F.cross_entropy(found.flatten(0, 1), expected.flatten())
        right = right + (found.detach().argmax(-1) == expected).float().mean()
    return torch.stack([language, each, 100 * right / len(told)])


def train(args: argparse.Namespace) -> None:
    """Train, and write ``encoder.pt`` and ``encoder.json`` (curves)."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    text = run_tokenizer(args.out)
    tokenizer = PromptTokenizer.from_json(text)
    prefix = torch.tensor(tokenizer.prefix, device=device)
    encoder = TrainedEncoder(encoder_config(tokenizer.tokenizer.get_vocab_size())).to(device)
    probes = Probes(encoder.config.hidden_size).to(device)
    masters = Masters([*encoder.parameters(), *probes.parameters()])

    def step(tails: Tensor, real: Tensor, said: Tensor) -> Tensor:
        features, logits = encoder(prefix, tails)
        parts = losses(logits, probes(features, real), tails, real, said)
        (_LANGUAGE * parts[0] + parts[1]).backward()
        return torch.cat([parts.detach(), masters.step().reshape(1)])

    recorded, curves = Recorded(step), Curves(args.out / "encoder.json")
    feed = captions(text, args.batch, args.workers, args.seed)
    for index in range(args.steps):
        masters.rate.fill_(rate_at(index, index / args.steps, args.rate))
        curves.add(index, NAMES, recorded(*(part.to(device) for part in next(feed))))
    masters.show(masters.average)
    save_checkpoint(args.out / "encoder.pt", encoder.state_dict())
    curves.save()


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    run_flags(parser, "folder of the run", steps=5000, batch=256, rate=3e-3, workers=6)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
