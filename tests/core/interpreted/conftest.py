"""Triton's interpreter must be chosen before Triton is imported, so these tests need a process of their own:
``tests/core/test_triton_kernels.py`` starts one. By hand:
``TRITON_INTERPRET=1 pytest tests/core/interpreted``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def poison_of(dtype: torch.dtype) -> float:
    """NaN, the smallest integer, or 171 of bytes: what no kernel is expected to write."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min if dtype.is_signed else 171


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    """New memory is NaN, or a number that is no index: what a kernel forgets to write shows."""

    def poisoned(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(poison_of(tensor.dtype))

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


@pytest.fixture(scope="session", autouse=True)
def _language_searched_once():
    """The interpreter puts its own functions into ``triton.language`` when a kernel starts or calls another,
    and takes them out at a kernel's end. To search it is a third of all time: here they stay."""
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_patch_lang", lambda kernel: interpreter._LangPatchScope())
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_sums_for_nothing():
    """The interpreter computes each sum of integers once more in 64 bits to see whether it overflows, and
    says so in its debug mode alone, which this is not."""
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield


@pytest.fixture(scope="session", autouse=True)
def _types_made_once():
    """Each number in a kernel has a type with its shape, which Triton makes and checks anew each time."""
    from triton.language import core
    from triton.runtime import interpreter

    make_type, make_tensor, numpy_type = (
        core.block_type.__init__,
        core.tensor.__init__,
        interpreter._get_np_dtype,
    )
    types: dict[tuple, dict[str, object]] = {}
    shapes: dict[str, dict[str, object]] = {}
    of_numpy: dict[str, np.dtype] = {}

    def type_of(self: core.block_type, element_ty: core.dtype, shape: Iterable) -> None:
        key = (element_ty.name, *[getattr(length, "value", length) for length in shape])
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key])

    def tensor(self: core.tensor, handle: object, type: core.dtype) -> None:
        if type.name not in shapes:
            make_tensor(self, None, type)
            shapes[type.name] = vars(self).copy()
        vars(self).update(shapes[type.name])
        self.handle, self.type = handle, type

    def dtype_of(kind: core.dtype) -> np.dtype:
        name = kind.scalar.name
        if name not in of_numpy:
            of_numpy[name] = numpy_type(kind)
        return of_numpy[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.block_type, "__init__", type_of)
        patch.setattr(core.tensor, "__init__", tensor)
        patch.setattr(interpreter, "_get_np_dtype", dtype_of)
        yield


class Fences:
    """Tensors between marked memory. The marks are NaNs of 63 kinds: what is read there shows in a result,
    and what is written there shows in them."""

    WIDTH = 8192

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self._kept: list[tuple[Tensor, Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A new one, itself full of marks."""
        length = math.prod(shape) * dtype.itemsize
        size = -(-length // 2)
        whole = size + 2 * self.WIDTH
        memory = torch.randint(0x7FC1, 0x8000, (whole,), generator=self._generator, dtype=torch.int16)
        self._kept.append((memory, memory.clone(), size))
        inner = memory[self.WIDTH : self.WIDTH + size]
        return inner.view(torch.uint8)[:length].view(dtype).view(shape)

    def around(self, x: Tensor) -> Tensor:
        """A contiguous copy of x."""
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def assert_intact(self) -> None:
        """Nothing was written but into the tensors."""
        for memory, before, size in self._kept:
            assert torch.equal(memory[: self.WIDTH], before[: self.WIDTH]), "written before a tensor"
            end = self.WIDTH + size
            assert torch.equal(memory[end:], before[end:]), "written behind a tensor"


@pytest.fixture
def fences(_poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Fences:
    """Fences that all new memory is made in, too."""
    fences, new = Fences(), Tensor.new_empty

    def empty(*shape, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        return fences.empty(*(shape[0] if isinstance(shape[0], torch.Size) else shape), dtype=dtype)

    def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return fences.empty(*x.shape, dtype=dtype or x.dtype)

    def new_empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None, **options) -> Tensor:
        if not options and math.prod(shape):
            return fences.empty(*shape, dtype=dtype or x.dtype)
        return new(x, *shape, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    return fences


@pytest.fixture
def float8_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's rounding to float8_e4m3fn in place of the interpreter's, which loses a carry into the
    exponent. Whether a GPU's is the same, only a test on one can say."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    theirs = InterpreterBuilder.create_fp_to_fp

    def convert(self, x, dtype, rounding):
        if dtype.scalar != tl.float8e4nv:
            return theirs(self, x, dtype, rounding)
        numbers = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.float8_e4m3fn)
        return TensorHandle(numbers.view(torch.uint8).numpy(), tl.float8e4nv)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", convert)
