"""A run's folder from a published one, to go on from it: ``python -m tools.nano.unpack checkpoints/nano/lens
--out RUN``, then ``train --out RUN --begin RUN/trained.pt``, or ``distill --out RUN``.

What training keeps beside the weights (the optimisers' moments, the masters' lower bits) is not published.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lens_core.quant import mxfp4

from .configs import encoder_config
from .encoder import TrainedEncoder
from .export import WEIGHTS


def unpack(folder: Path, run: Path) -> None:
    """Write ``run``'s tokenizer.json, vae.pt, encoder.pt and trained.pt from ``folder``, nano Lens in
    diffusers' layout with all its parts."""
    run.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "tokenizer" / "tokenizer.json", run / "tokenizer.json")
    torch.save(load_file(folder / "vae" / WEIGHTS), run / "vae.pt")
    torch.save(load_file(folder / "transformer" / WEIGHTS), run / "trained.pt")
    state = dense(load_file(folder / "text_encoder" / "model.safetensors"))
    encoder = TrainedEncoder(encoder_config(len(state["lm_head.weight"])))
    encoder.load(state)
    torch.save(encoder.state_dict(), run / "encoder.pt")


def dense(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's tensors with experts [E, rows, columns] in place of their MXFP4 blocks and scales."""
    state = {}
    for name, value in packed.items():
        if name.endswith("_blocks"):
            whole = name.removesuffix("_blocks")
            state[whole] = mxfp4.dequantize(value, packed[f"{whole}_scales"], torch.float32)
        elif not name.endswith("_scales"):
            state[name] = value
    return state


def main() -> None:
    """Read the flags and unpack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="nano Lens: transformer, text_encoder, vae and tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    args = parser.parse_args()
    unpack(args.folder, args.out)


if __name__ == "__main__":
    main()
