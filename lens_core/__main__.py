"""``python -m lens_core``."""

import os
import sys

# Read when torch is imported: memory that is taken and given back in other sizes leaves no gaps. A setting of
# the user's own stays.
if sys.platform == "linux":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from .cli import main

sys.exit(main())
