"""The encoder's operations: weights as stored, cast as they run, joined where they are neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lens_core.config import EncoderConfig
from lens_core.encoder import GptOssLayer
from lens_core.memory.flat import Layout
from lens_core.ops import CastingOperations, joined


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


def test_neighbours_in_memory_are_one_tensor():
    memory = torch.arange(60.0)
    first, second, third = memory[:20].view(5, 4), memory[20:28].view(2, 4), memory[28:40].view(3, 4)
    whole = joined([first, second, third])
    assert whole is not None and whole.data_ptr() == memory.data_ptr()
    assert torch.equal(whole, memory[:40].view(10, 4))
    assert joined([first, third]) is None, "something lies between"
    assert joined([second, first]) is None, "the other way round"
    assert joined([first, memory[20:30].view(5, 2)]) is None, "rows of another length"
    assert joined([first, memory[20:28].view(torch.int32).view(2, 4)]) is None, "another dtype"


def test_a_layer_store_lays_queries_keys_and_values_together():
    layer = GptOssLayer(EncoderConfig(), CastingOperations, dtype=torch.bfloat16, device="meta")
    layout = Layout.of(layer)
    for part in ("weight", "bias"):
        place = {
            name: (at, shape.numel() * 2) for name, at, shape, _ in layout.entries if name.endswith(part)
        }
        query, key, value = (place[f"self_attn.{name}_proj.{part}"] for name in "qkv")
        assert sum(query) == key[0] and sum(key) == value[0]
