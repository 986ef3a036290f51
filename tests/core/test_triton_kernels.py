"""The Triton kernels in Triton's interpreter, each file of ``interpreted/`` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).with_name("interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path):
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    # No tests at all is exit code 5, and a skipped one counts as failed.
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout.strip().splitlines()[-1])


def test_there_are_files_to_interpret():
    denoiser = {
        "test_block",
        "test_block_scales",
        "test_joint_attention",
        "test_linear",
        "test_linear_products",
    }
    encoder = {"test_attention", "test_encoder", "test_experts", "test_small"}
    assert {file.stem for file in FILES} == encoder | denoiser | {"test_strips"}
