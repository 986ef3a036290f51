"""The command line's operations: weights as stored, cast as they run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lens_core.ops import CastingOperations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32], ids=str)
def test_linear_computes_in_its_inputs_dtype(stored: torch.dtype, computed: torch.dtype, bias: bool):
    linear = CastingOperations.Linear(8, 4, bias=bias, dtype=stored)
    x = torch.randn(3, 8, dtype=computed)
    got = linear(x)
    cast = None if linear.bias is None else linear.bias.to(computed)
    assert got.dtype == computed
    assert torch.equal(got, F.linear(x, linear.weight.to(computed), cast))
    assert linear.weight.dtype == stored


def test_the_same_dtype_is_not_copied(monkeypatch: pytest.MonkeyPatch):
    linear, seen, plain = CastingOperations.Linear(8, 4), [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: seen.append(args[1:]) or plain(*args))
    linear(torch.randn(3, 8))
    ((weight, bias),) = seen
    assert weight is linear.weight and bias is linear.bias
