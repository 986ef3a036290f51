"""The Triton kernels in Triton's interpreter: ``interpreted/`` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("interpreted")
DENOISER = {"test_block", "test_block_scales", "test_joint_attention", "test_linear", "test_linear_products"}
ENCODER = {"test_attention", "test_encoder", "test_experts", "test_small"}
FILES = {*DENOISER, *ENCODER, "test_strips"}


def test_interpreted():
    # One process: to import PyTorch and diffusers for each file would take as long as its tests.
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    # No tests at all is exit code 5, and a skipped one counts as failed.
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout.strip().splitlines()[-1])


def test_all_files_are_there_to_interpret():
    assert {file.stem for file in FOLDER.glob("test_*.py")} == FILES
