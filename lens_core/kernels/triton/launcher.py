"""Launching a kernel again at half the time: Triton looks at every operand each time, this looks at less.

A forward of the denoiser launches five hundred kernels. Where the GPU waits for the CPU, at small sizes or
beside a slow CPU, the picture takes as long as these launches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend

# What Triton has compiled a kernel for: its constants and options, its operands' dtypes, its device.
_compiled: dict[tuple[Any, ...], Any] = {}
# Triton compiles for pointers at multiples of 16 bytes, or for any.
_ALIGNED = 15


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own goes through its compiler's types and takes 4 microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next from n on."""
    return 1 << (n - 1).bit_length()


def launch(
    function: Any,
    grid: Sequence[int],
    operands: Sequence[Tensor | float],
    constants: Mapping[str, Any],
    num_warps: int,
    **options: Any,
) -> None:
    """``function[grid](*operands, **constants)``, the constants in the order of its arguments.

    Its integers must be declared as not specialised, and be less than 2^31: one compiled kernel does for all.
    """
    name: list[Any] = [function, num_warps, *constants.values(), *options.values()]
    addresses = 0
    for operand in operands:
        if isinstance(operand, Tensor):
            name.append(operand.dtype)
            addresses |= operand.data_ptr()
    name.append(torch.cuda.current_device() if operands[0].is_cuda else None)  # type: ignore[union-attr]
    key = tuple(name)
    # For AMD's GPUs Triton compiles by a tensor's size too, which the key does not hold.
    known = not addresses & _ALIGNED and torch.version.hip is None
    compiled = _compiled.get(key) if known else None
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*operands, *constants.values())
        return
    compiled = function[tuple(grid)](*operands, **constants, num_warps=num_warps, **options)
    if known and not backend.interpreted():
        _check(function, operands, constants)
        _compiled[key] = compiled


def _check(function: Any, operands: Sequence[Any], constants: Mapping[str, Any]) -> None:
    names = [parameter.name for parameter in function.params]
    if names[len(operands) :] != list(constants):
        raise ValueError(f"{function} has {names[len(operands) :]} for constants, not {list(constants)}")
    for parameter, operand in zip(function.params, operands, strict=False):
        if isinstance(operand, int) and not parameter.do_not_specialize:
            raise ValueError(f"{function} would be compiled for each value of {parameter.name}")
