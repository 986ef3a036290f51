"""What a file is, from its header alone: which component of which model, in which layout and precision.

One table recognises everything, by the names of tensors; no tensor is read. A file of another model is named
as what it looks like, so that a list can leave it out and an error can say what came. A file may hold several
components, each below a prefix of its own (``keymap.PREFIXES``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from ..config import Variant
from ..errors import CheckpointError
from .gguf import GgufCheckpoint
from .keymap import COMPONENTS, owner
from .loader import AnyCheckpoint
from .opening import SUBFOLDERS, open_any
from .precision import precision_of
from .variant import variant_at


@dataclass(frozen=True)
class Kind:
    """One component of a file or folder."""

    component: str  # denoiser, encoder, vae, lora; "" for what no loader of this pack takes
    what: str  # "a Lens denoiser", "a FLUX denoiser", ...
    layout: str  # "single file", "folder of 2 shards", "GGUF", ...
    variant: Variant | None  # of a Lens denoiser
    quantisation: str  # "BF16", "mxfp8", "SDNQ uint4", "MXFP4 experts", "mixed: Q4_K, Q6_K", ...
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class _Look:
    """How a component is recognised: a pattern that one of its tensor names matches. ``form`` completes what
    it is called where a component comes in several forms."""

    component: str
    what: str
    form: str
    pattern: str

    @property
    def called(self) -> str:
        return f"{self.what} {self.form}".strip()


_LENS, _ENCODER = "a Lens denoiser", "a GPT-OSS encoder"
_QKV = r"transformer_blocks\.0\.attn\.img_qkv\."
_EXPERTS = r"layers\.0\.mlp\.experts\.gate_up_proj"
_LORA = (
    r"\.(?:lora_(?:down|up|mid|A|B)|lora\.(?:down|up)|lora_linear_layer\.(?:down|up)|hada_[wt][12]\w*"
    r"|lokr_[wt][12]\w*|oft_(?:blocks|diag|R)|dora_scale|diff(?:_b)?)(?:\.|$)"
)
# The first row that matches wins. A pattern that begins with letters is found ten times as fast.
_LOOKS: tuple[_Look, ...] = (
    _Look("lora", "a LoRA", "", _LORA),
    _Look("denoiser", _LENS, "quantised by SDNQ", _QKV + "zero_point$"),
    _Look("denoiser", _LENS, "quantised for ComfyUI", _QKV + "comfy_quant$"),
    _Look("denoiser", _LENS, "", _QKV + "weight$"),
    _Look("encoder", _ENCODER, "in MXFP4", _EXPERTS + "_blocks$"),
    _Look("encoder", _ENCODER, "quantised for ComfyUI", _EXPERTS + r"\.(?:comfy_quant|weight_scale)$"),
    _Look("encoder", _ENCODER, "in bf16 for ComfyUI", _EXPERTS + r"\.weight$"),
    _Look("encoder", _ENCODER, "in bf16", _EXPERTS + "$"),
    _Look("encoder", _ENCODER, "in OpenAI's own layout", r"block\.0\.mlp\.mlp1_weight\.blocks$"),
    _Look("vae", "a FLUX.2 VAE", "", r"(?:^|\.)bn\.running_mean$"),
    _Look("", "a FLUX denoiser", "", r"double_blocks\.0\.img_attn\.qkv\.weight$"),
    _Look("", "a FLUX denoiser (diffusers)", "", r"single_transformer_blocks\.0\.attn\.to_q\.weight$"),
    _Look("", "a Qwen-Image denoiser", "", r"transformer_blocks\.0\.attn\.add_q_proj\.weight$"),
    _Look("", "a Stable Diffusion checkpoint", "", r"input_blocks\.0\.0\.weight$"),
    _Look("", "a CLIP text encoder", "", r"text_model\.encoder\.layers\.0\.|transformer\.resblocks\.0\."),
    _Look("", "a T5 text encoder", "", r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$"),
    _Look("", "a VAE of another model", "", r"decoder\.conv_in\.weight$"),
    _Look("", "a language model", "", r"layers\.0\.self_attn\.q_proj\.weight$"),
)
_LENS_GGUF = _Look("denoiser", _LENS, "in GGUF", _QKV + "weight$")
_ENCODER_GGUF = _Look("encoder", _ENCODER, "in GGUF", r"^blk\.0\.ffn_gate_exps\.weight$")
_EXPECTED = {"denoiser": _LENS, "encoder": _ENCODER, "vae": "a FLUX.2 VAE"}
_ADVICE = {
    "denoiser": "Choose a file such as lens_turbo_bf16.safetensors, or a Lens folder.",
    "encoder": (
        "Choose gpt-oss-20b as OpenAI publishes it (a folder of shards, or its original/ folder), a file "
        "of it for ComfyUI (nvfp4, bf16), a GGUF of it with MXFP4 experts, or a Lens folder."
    ),
    "vae": "Choose flux2-vae.safetensors, or a Lens folder.",
}


def inspect(path: str | Path) -> tuple[Kind, ...]:
    """What a file, a component's folder or a whole Lens folder holds: one for each component, or one for all
    of a file of another model.

    Raises CheckpointError where it cannot be opened.
    """
    path = Path(path)
    folders = [path / name for name in SUBFOLDERS.values() if os.path.isdir(path / name)]
    if folders:
        return tuple(kind for folder in folders for kind in inspect(folder))
    checkpoint = open_any(path)
    looks = _looks(checkpoint)
    return tuple(_kind(path, checkpoint, look, alone=len(looks) == 1) for look in looks)


def describe(checkpoint: AnyCheckpoint) -> str:
    """What a checkpoint is, for an error message."""
    return " and ".join(look.called for look in _looks(checkpoint))


def require(checkpoint: AnyCheckpoint, component: str) -> str:
    """What the checkpoint's ``component`` (denoiser, encoder or vae) is called; raises CheckpointError where
    it holds none."""
    for look in _looks(checkpoint):
        if look.component == component:
            return look.called
    raise CheckpointError(
        f"{checkpoint.name} is {describe(checkpoint)}; expected {_EXPECTED[component]}. {_ADVICE[component]}"
    )


def open_part(path: str | Path, component: str) -> AnyCheckpoint:
    """The tensors of one component of a file or folder; raises CheckpointError where it holds none."""
    checkpoint = open_any(path)
    require(checkpoint, component)
    return part_of(checkpoint, component)


def part_of(checkpoint: AnyCheckpoint, component: str) -> AnyCheckpoint:
    """The checkpoint without the tensors that are another component's."""
    owned = _owned(checkpoint)
    own = {*owned[""], *owned[component]}
    part = copy(checkpoint)
    part.header = {name: info for name, info in checkpoint.header.items() if name in own}
    return part


def _owned(checkpoint: AnyCheckpoint) -> dict[str, list[str]]:
    """Names by component, by their prefixes; what has none is one component's, if it looks like that one, or
    everybody's ("")."""
    owned: dict[str, list[str]] = {component: [] for component in ("", *COMPONENTS)}
    for name in checkpoint.header:
        owned[owner(name)].append(name)
    look = _first_look(_LOOKS, owned[""])
    if look is not None and look.component in COMPONENTS:
        owned[look.component] += owned[""]
        owned[""] = []
    return owned


def _looks(checkpoint: AnyCheckpoint) -> list[_Look]:
    """One for each component of Lens, or one for all of another model."""
    if isinstance(checkpoint, GgufCheckpoint):
        return [_look_of_gguf(checkpoint)]
    owned = _owned(checkpoint)
    looks = [
        _first_look([look for look in _LOOKS if look.component == component], owned[""] + owned[component])
        for component in COMPONENTS
    ]
    names = list(checkpoint.header)
    unknown = f"an unknown kind of model ({names[0]}, ...)" if names else "a file without tensors"
    own = [look for look in looks if look is not None]
    return own or [_first_look(_LOOKS, names) or _Look("", unknown, "", "")]


def _first_look(looks: Iterable[_Look], names: Iterable[str]) -> _Look | None:
    lines = "\n".join(names)
    return next((look for look in looks if re.search(look.pattern, lines, re.MULTILINE)), None)


def _look_of_gguf(checkpoint: GgufCheckpoint) -> _Look:
    architecture = checkpoint.metadata.get("general.architecture", "an unnamed architecture")
    parts = checkpoint.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        return _Look("", f"one of {parts} parts of a GGUF (llama-gguf-split --merge joins them)", "", "")
    # By its tensors: nobody has agreed on an architecture's name for it.
    if _first_look([_LENS_GGUF], checkpoint.header):
        return _LENS_GGUF
    if architecture != "gpt-oss":
        return _Look("", f"a GGUF of {architecture}", "", "")
    without = _Look("", "a GGUF of gpt-oss without experts", "", "")
    return _first_look([_ENCODER_GGUF], checkpoint.header) or without


def _kind(path: Path, checkpoint: AnyCheckpoint, look: _Look, alone: bool) -> Kind:
    part = part_of(checkpoint, look.component) if look.component in COMPONENTS else checkpoint
    return Kind(
        look.component,
        look.what,
        _layout(path, checkpoint, look, alone and len(part.header) == len(checkpoint.header)),
        variant_at(path, checkpoint.metadata) if look.component == "denoiser" else None,
        precision_of(part, look.component),
        tuple(checkpoint.paths),
    )


def _layout(path: Path, checkpoint: AnyCheckpoint, look: _Look, alone: bool) -> str:
    if isinstance(checkpoint, GgufCheckpoint):
        return "GGUF"
    if look.form == "in OpenAI's own layout":
        return "OpenAI's original layout"
    if os.path.isdir(path):
        count = len(checkpoint.paths)
        return f"folder of {count} shards" if count > 1 else "folder with one file"
    if not alone:
        return "all-in-one file"
    return "ComfyUI single file" if look.form.endswith("for ComfyUI") else "single file"
