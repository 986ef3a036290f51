"""``python -m lens_core.tiny OUT_DIR --seed 0``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .layouts import write_everything


def main() -> int:
    """Write the models and print the files."""
    parser = argparse.ArgumentParser(prog="python -m lens_core.tiny", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="an empty folder, or a new one")
    parser.add_argument("--seed", type=int, default=0, help="other weights for another seed")
    args = parser.parse_args()
    try:
        files = write_everything(args.out, args.seed)
    except FileExistsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in files:
        print(f"{path.stat().st_size:>10,}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
