"""When a compiled kernel is launched straight, what it is given, and what goes through Triton.

Functions and what they are compiled to are stand-ins that note their calls.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.kernels.triton import block_launch, launcher, linear_launch
from lens_core.kernels.triton.launcher import cdiv, launch, power_of_2
from tests.core import block_cases
from tests.core import quantized_cases as cases

CONSTANTS = {"WIDTH": 96, "ADD": True}


class Compiled:
    """What a function was compiled to."""

    def __init__(self, calls: list[tuple]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *call: self.calls.append((self, grid, call))


class Function:
    """A Triton function x, y, rows, eps, WIDTH, ADD; compiles for each call anew."""

    def __init__(self, *specialised: str) -> None:
        self.straight: list[tuple] = []
        self.through_triton: list[tuple] = []
        self.made: list[Compiled] = []
        names = ("x", "y", "rows", "eps", *CONSTANTS)
        self.params = [
            SimpleNamespace(name=name, do_not_specialize=name == "rows" and name not in specialised)
            for name in names
        ]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*call: Any, **options: Any) -> Compiled:
            self.through_triton.append((grid, call, options))
            self.made.append(Compiled(self.straight))
            return self.made[-1]

        return run

    def counts(self) -> tuple[int, int]:
        """Launches through Triton, and straight."""
        return len(self.through_triton), len(self.straight)


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def operands(rows: int = 5, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, int, float]:
    """Two tensors at multiples of 16 bytes, a number of rows and an epsilon."""
    found = torch.randn(rows, 96).to(dtype), torch.randn(rows, 96)
    assert all(x.data_ptr() % 16 == 0 for x in found)
    return *found, rows, 1e-6


def same(got: tuple, want: tuple) -> bool:
    """The very same objects."""
    return len(got) == len(want) and all(a is b for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("grid", "three"), [((7,), (7, 1, 1)), ((7, 2), (7, 2, 1)), ((7, 2, 3), (7, 2, 3))])
def test_the_second_launch_goes_straight(grid: tuple[int, ...], three: tuple[int, int, int]):
    """With operands, then constants in their order, of other sizes and values too."""
    function, first = Function(), operands()
    launch(function, grid, first, CONSTANTS, 4, num_stages=2)
    (through,) = function.through_triton
    assert through[0] == grid and same(through[1], first)
    assert through[2] == {**CONSTANTS, "num_warps": 4, "num_stages": 2} and function.straight == []
    for rows in (5, 1, 16, 4096):
        second = operands(rows)
        launch(function, list(grid), second, dict(CONSTANTS), 4, num_stages=2)
        compiled, three_wide, call = function.straight[-1]
        assert compiled is function.made[0] and three_wide == three and isinstance(three_wide, tuple)
        assert same(call[:4], second) and call[4:] == (96, True)
    assert function.counts() == (1, 4)


class OnGpu(Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


def test_each_gpu_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch):
    function, now = Function(), 0
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now)
    x, *rest = operands()
    for now in (0, 1, 0, 1):  # noqa: B007
        launch(function, (7,), (x.as_subclass(OnGpu), *rest), CONSTANTS, 4)
    assert function.counts() == (2, 2)
    assert [call[0] for call in function.straight] == function.made


def others() -> dict[str, dict[str, Any]]:
    """What differs from the launch before, for which its kernel is the wrong one."""
    x, y, *numbers = operands()
    return {
        "dtype of the first": {"operands": (x.bfloat16(), y, *numbers)},
        "dtype of the second": {"operands": (x, y.half(), *numbers)},
        "dtypes in another order": {"operands": (y, x, *numbers)},
        "a constant": {"constants": {"WIDTH": 128, "ADD": True}},
        "another constant": {"constants": {"WIDTH": 96, "ADD": False}},
        "warps": {"num_warps": 8},
        "an option": {"num_stages": 3},
        "no option": {"num_stages": None},
        "another function": {"function": Function()},
    }


@pytest.mark.parametrize("what", others())
def test_what_a_kernel_is_compiled_for(what: str):
    function = Function()
    usual = {
        "function": function,
        "grid": (7,),
        "operands": operands(),
        "constants": CONSTANTS,
        "num_warps": 4,
        "num_stages": 2,
    }
    other = {name: value for name, value in (usual | others()[what]).items() if value is not None}
    theirs = other["function"]
    launch(**usual)
    launch(**other)
    through = function.counts()[0] + (theirs.counts()[0] if theirs is not function else 0)
    assert through == 2 and function.straight == theirs.straight == []
    launch(**usual)
    launch(**other)
    straight = [
        call[0] for call in (*function.straight, *(theirs.straight if theirs is not function else ()))
    ]
    made = [*function.made, *(theirs.made if theirs is not function else ())]
    assert straight == made and len(made) == 2, "each is kept, and found again"


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("offset", [1, 2, 7])
def test_pointers_at_other_addresses_go_through_triton(which: int, offset: int):
    """Which compiles for any address, and whose kernel nothing else may take."""
    function, aligned = Function(), operands()
    moved = list(aligned)
    moved[which] = torch.empty(6 * 96).to(moved[which].dtype)[offset : offset + 5 * 96].view(5, 96)
    assert moved[which].data_ptr() % 16
    for _ in range(2):
        launch(function, (7,), moved, CONSTANTS, 4)
    assert function.counts() == (2, 0), "not kept"
    for _ in range(2):
        launch(function, (7,), aligned, CONSTANTS, 4)
    assert function.counts() == (3, 1) and function.straight[0][0] is function.made[2]
    launch(function, (7,), moved, CONSTANTS, 4)
    assert function.counts() == (4, 1) and same(function.through_triton[-1][1], tuple(moved))


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    function = Function()
    for _ in range(3):
        launch(function, (7,), operands(), CONSTANTS, 4)
    assert function.counts() == (3, 0) and launcher._compiled == {}


def test_amd_launches_go_through_triton(monkeypatch: pytest.MonkeyPatch):
    """It compiles for a tensor's size there, too."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    function = Function()
    for _ in range(3):
        launch(function, (7,), operands(), CONSTANTS, 4)
    assert function.counts() == (3, 0) and launcher._compiled == {}


@pytest.mark.parametrize(
    "constants",
    [{"ADD": True, "WIDTH": 96}, {"WIDTH": 96}, {**CONSTANTS, "MORE": 1}, {"rows": 1, **CONSTANTS}],
)
def test_constants_in_another_order_are_a_mistake(constants: dict[str, Any]):
    """Straight, they would be given to each other's names."""
    with pytest.raises(ValueError, match=r"has \['WIDTH', 'ADD'\] for constants, not \["):
        launch(Function(), (7,), operands(), constants, 4)
    assert launcher._compiled == {}


def test_a_missing_operand_is_a_mistake():
    with pytest.raises(
        ValueError, match=r"has \['eps', 'WIDTH', 'ADD'\] for constants, not \['WIDTH', 'ADD'\]"
    ):
        launch(Function(), (7,), operands()[:3], CONSTANTS, 4)


def test_an_integer_that_is_specialised_is_a_mistake():
    """The kernel for 16 rows would be launched with 5."""
    with pytest.raises(ValueError, match="would be compiled for each value of rows"):
        launch(Function("rows"), (7,), operands(16), CONSTANTS, 4)
    assert launcher._compiled == {}
    launch(Function(), (7,), operands(16), CONSTANTS, 4)
    assert len(launcher._compiled) == 1, "floats are not"


@pytest.mark.parametrize("tokens", [(5,), (5, 3)], ids=str)
def test_the_denoisers_kernels_are_declared_so(tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Every launch of theirs passes the checks, also those that the interpreter leaves out."""
    launched: set[str] = set()

    def checked(function: Any, grid: Any, given: Any, constants: Any, num_warps: int, **_: Any) -> None:
        launcher._check(function, given, constants)
        assert len(given) + len(constants) == len(function.params) and 1 <= len(grid) <= 3
        launched.add(function.__name__)

    for module in (linear_launch, block_launch):
        monkeypatch.setattr(module, "launch", checked)
    monkeypatch.setattr(linear_launch, "multiprocessors", lambda _: 1)
    rows = block_cases.rows(tokens, 2, 128, torch.bfloat16)
    norms = block_cases.head_norms(len(tokens), torch.bfloat16)
    qkv = block_cases.projections(tokens, 2, 2, torch.bfloat16)
    rotary = block_cases.angles(tokens)[1]
    for kind in ("int8", "float8", None):
        block_launch.add_modulate(rows, 2, 3, kind)
        block_launch.swiglu(qkv, qkv, kind)
    block_launch.add_modulate([row._replace(update=None, before=None) for row in rows], 2, 3)
    block_launch.add_modulate([row._replace(weight=None, after=None) for row in rows], 2, 3)
    block_launch.joint_heads(qkv, norms, rotary)
    block_launch.attend(qkv, norms, rotary, True)
    linear_launch.quantize_rows(qkv, "int8")
    linear_launch.multiply(*zip(*cases.layers("int8", tokens, 24, 64), strict=True))
    for pair in cases.pairs(4, 64, 32).values():
        linear_launch.unpack([packed for packed, _ in pair[: len(tokens)]], torch.bfloat16)
    block_kernels = {"add_modulate", "swiglu", "swiglu_quantized", "turn_heads", "attend"}
    assert launched == block_kernels | {"quantize_rows", "multiply", "unpack"}


def test_helpers():
    numbers = [1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129, 4096, 4097, 2**31 - 1]
    assert cdiv(0, 128) == 0
    for n in numbers:
        assert power_of_2(n) == 2 ** math.ceil(math.log2(n))
        for d in numbers:
            assert cdiv(n, d) == n // d + (n % d > 0)
