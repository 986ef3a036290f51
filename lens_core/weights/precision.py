"""In which precision a checkpoint's weights are, in words, from its header alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from .loader import AnyCheckpoint
from .tensor_info import TensorInfo

Header = Mapping[str, TensorInfo]
_PLAIN = ("F64", "F32", "F16", "BF16")
# (a tensor beside a weight of whole bytes, what the two are); the first that is there.
_BESIDE: tuple[tuple[str, str], ...] = (
    ("zero_point", "SDNQ uint4"),
    ("scale", "SDNQ"),
    ("weight_zero", "4 bits in groups"),
    ("weight_scale_2", "nvfp4"),
)
# Of the encoder nine tenths are experts; one bank of the first layer tells what all are.
_EXPERTS = re.compile(
    r"(?:mlp\.experts\.gate_up_proj(?:_blocks|\.weight|)|mlp\.mlp1_weight\.blocks|ffn_gate_exps\.weight)$"
)
# A share of the weights below which another precision is not worth a word.
_MINOR = 0.02


def precision_of(checkpoint: AnyCheckpoint, component: str) -> str:
    """Of a component's weights, such as "BF16", "mxfp8" or "mixed: Q4_K, Q6_K"."""
    told = checkpoint.metadata.get("lens.quantization")
    if component == "denoiser" and told:
        return str(told)
    if component == "encoder":
        return _of_experts(checkpoint.header)
    sizes: Counter[str] = Counter()
    for name, info in checkpoint.header.items():
        if name.endswith(".weight") or component == "lora":
            sizes[_word(checkpoint.header, name.removesuffix(".weight"), info)] += info.nbytes
    # Beside quantised layers there are always some in full: modulation, the ends.
    quantised = [word for word in sizes if word not in _PLAIN]
    words = [word for word in quantised or sizes if sizes[word] > _MINOR * sizes.total()]
    words.sort(key=lambda word: -sizes[word])
    return f"mixed: {', '.join(words)}" if len(words) > 1 else "".join(words)


def _of_experts(header: Header) -> str:
    for name, info in header.items():
        if _EXPERTS.search(name):
            if name.endswith("blocks"):
                return "MXFP4 experts"
            if f"{name}_scale_2" in header:
                return "nvfp4 experts"
            return info.dtype if info.dtype in _PLAIN else f"{info.dtype} experts"
    return ""


def _word(header: Header, layer: str, info: TensorInfo) -> str:
    scale = header.get(f"{layer}.weight_scale") or header.get(f"{layer}.scale_weight")
    if info.dtype in ("U8", "I8"):
        found = (word for beside, word in _BESIDE if f"{layer}.{beside}" in header)
        integers = info.dtype if scale is None else "W4A4 ConvRot" if _two_in_a_byte(header) else "int8"
        return next(found, integers)
    if info.dtype.startswith("F8_"):
        if scale is None:
            return "fp8"
        return "mxfp8" if len(scale.shape) == 2 and scale.shape[1] > 1 else "fp8 with scales"
    return info.dtype


def _two_in_a_byte(header: Header) -> bool:
    """Whether the rows of a denoiser's first quantised projection are half as long as it has inputs."""
    qkv = next((info.shape for name, info in header.items() if name.endswith("0.attn.img_qkv.weight")), ())
    return len(qkv) == 2 and qkv[0] // 3 == 2 * qkv[1]
