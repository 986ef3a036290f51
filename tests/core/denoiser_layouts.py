"""Writers of the tiny denoiser in every quantised layout, and what tests ask of the loaded ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.denoiser import LensDenoiser
from lens_core.loading import load_denoiser
from lens_core.quant.layer_format import from_json
from lens_core.quantized import QuantizedLinear
from lens_core.weights.gguf_linear import TYPES
from tests import denoiser_gguf
from tests import denoiser_quantized as files
from tests.compare import relative_l2
from tests.denoiser_quantized import Written

Write = Callable[[Path], tuple[Path, Written]]


def single(write: Callable[..., Written], **changes: object) -> Write:
    """A writer of a file, in a folder."""

    def run(folder: Path, **more: object) -> tuple[Path, Written]:
        path = folder / "lens.safetensors"
        return path, write(path, **changes, **more)

    return run


def write_gguf(folder: Path, kind: object, prefix: str = "") -> tuple[Path, Written]:
    written = denoiser_gguf.write_denoiser(folder / "lens.gguf", kind, prefix=prefix)  # type: ignore[arg-type]
    layers = [name.removesuffix(".weight") for name, (used, _) in written.items() if used in TYPES]
    return folder / "lens.gguf", Written({name: value for name, (_, value) in written.items()}, layers)


def write_sdnq(folder: Path, **changes: object) -> tuple[Path, Written]:
    return folder / "lens", files.write_sdnq(folder / "lens", **changes)  # type: ignore[arg-type]


LAYOUTS: dict[str, Write] = {
    **{kind: single(files.write_comfy, kind=kind) for kind in files.COMFY},
    "scaled": single(files.write_scaled),
    "scaled e5m2": single(files.write_scaled, dtype=torch.float8_e5m2),
    "scaled, full precision": single(files.write_scaled, mark=2),
    "sdnq": write_sdnq,
    "sdnq in fp32": partial(write_sdnq, scales=torch.float32),
    "sdnq by 32, not flat": partial(write_sdnq, group=32, flat=False),
    **{kind: partial(write_gguf, kind=kind) for kind in TYPES},
}


def loaded(write: Write, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[LensDenoiser, Written]:
    path, written = write(folder)
    return load_denoiser(path, dtype), written


def layers_of(model: LensDenoiser) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def velocity(model: LensDenoiser) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    config, dtype = model.config, model.img_in.bias.dtype
    latents = torch.randn(1, 12, config.in_channels, generator=generator)
    text = 100 * torch.randn(1, 7, config.num_text_layers, config.enc_hidden_dim, generator=generator)
    return model(latents.to(dtype), torch.tensor([0.7], dtype=dtype), text.to(dtype), (4, 3)).float()


def dense(written: Written, path: Path) -> LensDenoiser:
    """The same numbers, not quantised, in bf16."""
    save_file({name: value.contiguous() for name, value in written.values.items()}, path)
    return load_denoiser(path, torch.bfloat16)


def error(written: Written) -> float:
    """How far all of a file's matrices are from those that were quantised."""
    weights = files.tiny_weights()
    names = [name for name, weight in weights.items() if weight.ndim == 2]
    got, want = (
        torch.cat([values[name].flatten() for name in names]) for values in (written.values, weights)
    )
    return relative_l2(got, want)


def assert_holds(model: LensDenoiser, written: Written) -> None:
    """Every number is the file's."""
    quantized = layers_of(model)
    assert sorted(quantized) == sorted(written.layers)
    assert quantized, "a comparison of nothing"
    for name, layer in quantized.items():
        assert torch.equal(layer.dequantized(torch.float32), written.values[f"{name}.weight"]), name
        assert from_json(layer.comfy_quant, name) == layer.form, "so that it is saved as what it is"
    state = model.state_dict()
    for name in written.values.keys() - {f"{layer}.weight" for layer in quantized}:
        assert torch.equal(state[name], written.values[name]), name
