"""Encoders that the tests of this folder place on a GPU of chosen size."""

from __future__ import annotations

import pytest
import torch

from tests.host.conftest import PROMPT
from tests.host.fake_gpu import GPU, FakeGpu

NAME = "gpt_oss_tiny_mxfp4.safetensors"
LAYERS = 24


@pytest.fixture
def load(host):
    """Loads an encoder of the test's own, features not kept on disk."""

    def run(**settings):
        (clip,) = host.run("LensEncoderLoader", **{"encoder_name": NAME, "feature_cache": False, **settings})
        return clip

    return run


@pytest.fixture
def patcher(load):
    return load().patcher


@pytest.fixture
def gpu(management, monkeypatch):
    """Room for everything; tests make it smaller."""
    return FakeGpu(1 << 40).install(monkeypatch)


def layer_size(patcher) -> int:
    [size] = set(patcher.model.text.layers.sizes)
    assert size * LAYERS == patcher.model_size()
    return size


def encode(clip, prompt=PROMPT):
    [[features, _]] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return features


@pytest.fixture
def encodes_right(tiny):
    """Asserts that an encoder gives PROMPT's features on the GPU, whatever lies there."""
    tokens = tiny.clip.tokenize(PROMPT)

    def check(patcher) -> None:
        patcher.model.set_clip_options({"execution_device": GPU})
        features, _, _ = patcher.model.encode_token_weights(tokens)
        assert torch.equal(features, tiny.positive[0][0])

    return check
