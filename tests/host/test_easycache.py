"""ComfyUI's own step-skipping nodes on our MODEL."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.compare import relative_l2
from tests.host.helpers import recorded

STEPS = 20
# Its default of 0.2 is for trained weights: between two steps of random ones more changes.
SETTINGS = {"reuse_threshold": 0.5, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
NODES = ("EasyCache", "LazyCache")


@pytest.fixture(scope="module", autouse=True)
def easycache_nodes(host):
    import nodes

    path = Path(nodes.__file__).parent / "comfy_extras" / "nodes_easycache.py"
    assert asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras"))


def protected(model):
    """A clone of MODEL whose EasyCache may write into x: in fp32 that is the sampler's own latent, and
    ComfyUI 0.30 goes on with what was written."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "first", lambda executor, x, *rest, **kw: executor(x.clone(), *rest, **kw)
    )
    return clone


@pytest.mark.parametrize("node_id", NODES)
def test_steps_are_skipped_and_the_picture_is_near(host, tiny, draw, node_id):
    (patched,) = host.run(node_id, model=tiny.model, **SETTINGS)
    model, recorder = recorded(patched)
    got, want = draw(model=model, steps=STEPS)["samples"], draw(steps=STEPS)["samples"]
    # Measured: 26 (EasyCache) and 24 (LazyCache) of 40 forwards, at a distance of 0.13 and 0.19.
    assert 2 * STEPS // 3 < len(recorder.calls) < 2 * STEPS * 3 // 4
    assert got.isfinite().all()
    assert 0 < relative_l2(got, want) < 0.25


@pytest.mark.parametrize("node_id", NODES)
def test_as_on_comfyuis_own_lens(host, tiny, draw, stock_model, node_id):
    results = []
    for model in (tiny.model, protected(stock_model)):
        (patched,) = host.run(node_id, model=model, **SETTINGS)
        model, recorder = recorded(patched)
        results.append((draw(model=model, steps=STEPS)["samples"], len(recorder.calls)))
    (ours, forwards), (theirs, expected) = results
    assert forwards == expected < 2 * STEPS
    # 20 steps in fp32; measured: 3e-7.
    assert relative_l2(ours, theirs) < 1e-5


@pytest.mark.parametrize("node_id", NODES)
def test_below_its_threshold_nothing_changes(host, tiny, draw, node_id):
    (patched,) = host.run(node_id, model=tiny.model, **{**SETTINGS, "reuse_threshold": 1e-6})
    model, recorder = recorded(patched)
    assert (draw(model=model, steps=5)["samples"] == draw(steps=5)["samples"]).all()
    assert len(recorder.calls) == 10
