"""Memory that runs out at a chosen call of a layer or function of ours, while its frame holds a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class Shortage:
    """Throws at the calls for which ``fails`` says so; ``loaded`` has the models loaded at the call after."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails, self.calls = fails, 0
        self.held: list[weakref.ref] = []
        self.leaked = False
        self.loaded: list[Any] | None = None

    def __call__(self, *_: Any, **__: Any) -> None:
        import comfy.model_management as management

        self.calls += 1
        self.leaked |= any(ref() is not None for ref in self.held)
        if self.held and self.loaded is None:
            self.loaded = management.loaded_models()
        if self.fails(self.calls):
            tensor = torch.zeros(10)
            self.held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def first(call: int) -> bool:
    return call == 1


def always(call: int) -> bool:
    return True


def before(function: Callable, shortage: Shortage) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        shortage(*args)
        return function(*args, **kwargs)

    return run


def shorten(host: Any, tiny: Any, monkeypatch: Any) -> Callable[..., Shortage]:
    """Makes a stage run short of memory at chosen calls of something in it."""
    network, autoencoder = tiny.model.model.diffusion_model, tiny.vae.first_stage_model
    places = {
        "load model": (host.module("lens_core.denoiser_file").DenoiserFile, "load"),
        "load vae": (host.module("nodes.host.vae"), "load_vae"),
        "encode": (host.module("lens_core.encoder.gpt_oss").GptOssLayer, "forward"),
        "sample": (network.norm_out, "forward"),
        "decode": (autoencoder, "decode"),
    }

    def run(stage: str, fails: Callable[[int], bool]) -> Shortage:
        shortage = Shortage(fails)
        owner, name = places[stage]
        monkeypatch.setattr(owner, name, before(getattr(owner, name), shortage), raising=False)
        return shortage

    return run
