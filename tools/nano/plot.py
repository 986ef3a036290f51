"""Draws the curves of a run: ``python -m tools.nano.plot RUN`` writes RUN/curves.png (needs matplotlib)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lens_core.errors import MissingPackage

# File and titles of the losses drawn from it.
PARTS = {
    "vae.json": ("L1", "edges"),
    "encoder.json": ("language", "told"),
    "train.json": ("flow",),
    "distill.json": ("step 1", "step 2", "step 3", "step 4"),
}
TITLES = {"vae.json": "VAE", "encoder.json": "Encoder", "train.json": "Denoiser", "distill.json": "Turbo"}


def smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    """Running means, without the pull to zero at their begin."""
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def plot(run: Path) -> Path:
    """Draw what there is of the four trainings; returns the picture's path."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackage("Drawing curves needs matplotlib: pip install matplotlib.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    present = {name: json.loads((run / name).read_text()) for name in PARTS if (run / name).exists()}
    figure, axes = pyplot.subplots(1, len(present), figsize=(4.2 * len(present), 3.2), squeeze=False)
    for axis, (name, points) in zip(axes[0], present.items(), strict=True):
        for part in PARTS[name]:
            axis.plot(
                [point["step"] for point in points], smoothed([point[part] for point in points]), label=part
            )
        axis.set(title=TITLES[name], xlabel="step", yscale="log")
        axis.locator_params(axis="x", nbins=5)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path = run / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    """Read the flag and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    print(plot(parser.parse_args().run))


if __name__ == "__main__":
    main()
