"""One more attempt, outside the handler of the first one's error; then one error of our own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lens_core.memory.recovery import OutOfMemory, recovering, shortage


class Stage:
    """An attempt that holds a tensor as it runs out of memory, and what is done about it, in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.held: weakref.ref | None = None

    def short(self) -> None:
        tensor = torch.zeros(10)
        self.held = weakref.ref(tensor)
        self.done.append("short")
        raise torch.OutOfMemoryError("no room")

    def free(self) -> None:
        self.done.append("free")
        assert self.held() is None, "the failed attempt's tensor is still there"

    def run(self, attempt, smaller):
        def explain() -> OutOfMemory:
            return shortage("while testing", 2e9, 0.5e9, ["less", "more"])

        return recovering(attempt, smaller, what="while testing", free=self.free, explain=explain)


@pytest.fixture
def stage():
    """Without the garbage collector's own runs: what is gone is so because nothing holds it."""
    gc.disable()
    yield Stage()
    gc.enable()


def test_what_works_is_done_once(stage):
    assert stage.run(lambda: 7, stage.short) == 7
    assert not stage.done


def test_a_second_attempt(stage, caplog):
    assert stage.run(stage.short, lambda: 8) == 8
    assert stage.done == ["short", "free"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Out of memory while testing" in caplog.text


def test_none_is_a_result_too(stage):
    assert stage.run(stage.short, lambda: None) is None


def test_no_third(stage):
    with pytest.raises(OutOfMemory) as caught:
        stage.run(stage.short, stage.short)
    assert stage.done == ["short", "free", "short", "free"]
    assert isinstance(caught.value, torch.OutOfMemoryError) and caught.value.__context__ is None
    assert str(caught.value) == (
        "CUDA out of memory while testing (2.00 GB are needed, 0.50 GB are free), even after everything else "
        "was unloaded and with the smallest plan. Try less; or more."
    )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError, OutOfMemory])
def test_everything_else_passes(stage, error):
    """Also the error of an attempt inside this one: it has been tried again already."""

    def fail() -> None:
        raise error

    with pytest.raises(error):
        stage.run(fail, stage.short)
    with pytest.raises(error):
        stage.run(stage.short, fail)
    assert stage.done == ["short", "free"]


def test_sizes_that_nobody_knows_are_not_named():
    assert "(0.00 GB are free)" in str(shortage("here", None, 0, ()))
    assert str(shortage("here", None, None, ())).endswith("smallest plan.")
