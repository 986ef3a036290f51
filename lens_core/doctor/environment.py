"""The computer: versions, memory, GPUs, and the settings that change what Lens does on it."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import __version__
from .report import FAULTS, Finding, Section, sentence

_PACKAGES = (
    "diffusers",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "gguf",
    "comfy-kitchen",
    "triton",
    "triton-windows",
    "kernels",
    "torchao",
    "sdnq",
    "Pillow",
    "psutil",
)
# Whose values are shown; of others that begin with _PREFIXES the names alone: they may be secrets or folders.
_SHOWN = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
    "HF_HUB_OFFLINE",
    "HF_HUB_ENABLE_HF_TRANSFER",
    "HF_HUB_DISABLE_XET",
)
_PREFIXES = ("HF_", "HUGGING_FACE_", "TRITON_", "KERNELS_", "TORCHINDUCTOR_", "PYTORCH_", "COMFYUI_")


def section(root: Path | None = None) -> Section:
    """The section; ``root`` is the pack's folder (None: where this file is)."""
    root = Path(__file__).parents[2] if root is None else root
    commit = commit_of(root)
    found = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    absent = [name for name in _PACKAGES if name not in found]
    memory = psutil.virtual_memory()
    rows = {
        "Lens pack": f"{__version__}{f', commit {commit[:12]}' if commit else ''}",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.release()}, "
        f"{platform.machine()}",
        "PyTorch": f"{torch.__version__} ({_build()})",
        "packages": ", ".join(f"{name} {version}" for name, version in found.items()),
        "not installed": ", ".join(absent) or "none of those that matter",
        "RAM": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} free",
        "CPU": f"{os.cpu_count()} threads",
        "settings": ", ".join(_settings()) or "none of those that matter",
    }
    facts: dict[str, dict[str, Any]] = {
        "packages": {"packages": found},
        "Lens pack": {"version": __version__, "commit": commit},
    }
    findings = [Finding(name, text, facts=facts.get(name, {})) for name, text in rows.items()]
    return Section("Environment", [*findings, *_gpus()])


def commit_of(root: Path) -> str | None:
    """The commit that a git checkout is at, read from its files; None where it is none."""
    git = root / ".git"
    try:
        if git.is_file():  # a work tree: a line that says where its own folder is
            git = root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return _commit(head)
        branch = head.removeprefix("ref: ")
        shared = git / "commondir"
        common = git / shared.read_text(encoding="utf-8").strip() if shared.is_file() else git
        if (common / branch).is_file():
            return _commit((common / branch).read_text(encoding="utf-8").strip())
        packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((_commit(line.split()[0]) for line in packed if line.endswith(f" {branch}")), None)
    except (OSError, UnicodeDecodeError):
        return None


def _commit(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _build() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "for the CPU alone" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _settings() -> list[str]:
    """Environment variables that are set and change what happens."""
    shown = [f"{name}={os.environ[name]}" for name in _SHOWN if name in os.environ]
    others = sorted(name for name in os.environ if name.startswith(_PREFIXES) and name not in _SHOWN)
    return [*shown, *(f"{name} is set" for name in others)]


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        other = "Apple's (MPS)" if torch.backends.mps.is_available() else "none that PyTorch can use"
        return [Finding("GPU", other)]
    findings = [_gpu(number) for number in range(torch.cuda.device_count())]
    allocator = torch.cuda.get_allocator_backend()
    return [*findings, Finding("GPU driver", f"{_driver() or 'version unknown'}; allocator {allocator}")]


def _gpu(number: int) -> Finding:
    name = f"GPU {number}"
    try:
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
    except FAULTS as error:
        return Finding(name, f"does not answer ({sentence(error)})", broken=True)
    text = f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
    text += f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free"
    return Finding(name, text, facts={"total": total, "free": free})


def _driver() -> str | None:
    """Of NVIDIA's kernel module on Linux; elsewhere it would take a program of theirs."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None
