"""Triton's interpreter must be chosen before Triton is imported, so these tests need a process of their own:
``tests/core/test_triton_kernels.py`` starts one per file. By hand:
``TRITON_INTERPRET=1 pytest tests/core/interpreted``."""

from __future__ import annotations

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    """New memory is NaN, or a number that is no index: what a kernel forgets to write shows."""

    def poisoned(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
