"""The doctor's report: what it says of the computer and the fast paths, and what it keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lens_core.doctor import Examination, check, environment, fast_paths
from lens_core.doctor.fast_paths import FAST_PATHS, FastPath, examine
from lens_core.doctor.report import Finding, Privacy, Report, Section, sentence
from lens_core.errors import SettingError
from lens_core.kernels import backend
from lens_core.quant import kitchen

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def nothing(*_: object) -> None:
    pass


# The computer


def test_the_computer_is_described():
    facts = {finding.name: finding.text for finding in environment.section().findings}
    assert facts["Lens pack"].startswith("0.1.0")
    assert f"{torch.__version__} (" in facts["PyTorch"]
    assert "diffusers 0." in facts["packages"] and "safetensors" in facts["packages"]
    assert "diffusers" not in facts["not installed"]
    assert " GB, " in facts["RAM"]
    assert facts["GPU"] == "none that PyTorch can use"


def test_secrets_and_folders_are_only_said_to_be_set(monkeypatch: pytest.MonkeyPatch):
    values = {"HF_TOKEN": "hf_secret", "HF_HOME": "/data/joe/hub", "HF_ENDPOINT": "https://joe:pw@mirror"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    text = Report([environment.section()]).text()
    assert "PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync" in text
    assert [name for name in values if f"{name} is set" not in text] == []
    assert [value for value in values.values() if value in text] == []


@pytest.mark.parametrize("kind", ["branch", "packed", "detached", "work tree"])
def test_the_commit_is_read_from_a_checkout(kind: str, tmp_path: Path):
    git = tmp_path / ".git"
    git.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    if kind == "detached":
        (git / "HEAD").write_text(f"{COMMIT}\n")
    elif kind == "packed":
        (git / "packed-refs").write_text(f"# pack-refs\n{COMMIT} refs/heads/main\n")
    else:
        (git / "refs" / "heads").mkdir(parents=True)
        (git / "refs" / "heads" / "main").write_text(f"{COMMIT}\n")
    root = tmp_path
    if kind == "work tree":
        root, own = tmp_path / "tree", git / "worktrees" / "tree"
        root.mkdir()
        own.mkdir(parents=True)
        (root / ".git").write_text(f"gitdir: {own}\n")
        (own / "HEAD").write_text("ref: refs/heads/main\n")
        (own / "commondir").write_text("../..\n")
    assert environment.commit_of(root) == COMMIT


@pytest.mark.parametrize("head", [None, b"ref: refs/heads/gone", b"\xff\xfe", b"no commit"])
def test_what_is_no_checkout_has_no_commit(head: bytes | None, tmp_path: Path):
    if head is not None:
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "HEAD").write_bytes(head)
    assert environment.commit_of(tmp_path) is None


def test_a_gpu_that_does_not_answer_is_broken(monkeypatch: pytest.MonkeyPatch):
    def fail(_: int) -> None:
        raise RuntimeError("CUDA error: device not ready")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    gpu = next(x for x in environment.section().findings if x.name == "GPU 0")
    assert gpu.broken and "device not ready" in gpu.text


# The fast paths


def test_without_a_gpu_every_fast_path_is_off_with_its_reason():
    *findings, attention = fast_paths.section(CPU, torch.float32).findings
    assert len(findings) == len(FAST_PATHS)
    assert {finding.text for finding in findings} == {"no: there is no GPU for it, CPU computes"}
    assert not any(finding.broken for finding in findings)
    assert attention.text == "PyTorch's"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)], ids=str)
def test_each_fast_path_says_its_own_limit(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """On a GPU that is not there: limits are asked, nothing runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(backend, "self_tested", lambda _: (1e-3, None))
    kitchen._capability.cache_clear()
    found = {path.name: examine(path, CUDA, torch.bfloat16).text for path in FAST_PATHS}
    kitchen._capability.cache_clear()
    on = {name for name, text in found.items() if text.startswith("yes")}
    assert found["CUDA graphs"] == "no: CUDA's asynchronous allocator is in use"
    assert ("denoiser, own attention" in on) == (capability == (9, 0))
    assert ("encoder, MXFP4 experts" in on) == ("VAE, between convolutions" in on) == (capability >= (8, 0))
    assert ("products in float8" in on) == (capability >= (8, 9))
    assert ("products in nvfp4" in on) == (capability >= (10, 0))
    if capability == (7, 5):
        assert "compute capability 7.5" in found["FlashAttention-3"]
        assert "they need 8.0" in found["quantised weights"]


def test_a_self_test_gives_its_error_and_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    finding = examine(FastPath("it", lambda *_: None, lambda *_: 2e-3), CPU, torch.bfloat16)
    assert finding.text.startswith("yes, self-test 2.0e-03 of 1e-02 allowed, 0.0 s") and not finding.broken
    assert finding.facts["error"] == 2e-3


@pytest.mark.parametrize("error", [0.5, float("inf"), None])
def test_a_failed_self_test_is_broken(error: float | None, monkeypatch: pytest.MonkeyPatch):
    def difference(*_: object) -> float:
        if error is None:
            raise OSError("gcc: not found")
        return error

    monkeypatch.setattr(backend, "interpreted", lambda: True)
    finding = examine(FastPath("it", lambda *_: None, difference), CPU, torch.bfloat16)
    assert finding.broken
    assert ("gcc: not found" if error is None else f"differs from PyTorch by {error:.1e}") in finding.text


# The report


def test_broken_findings_are_marked_counted_and_never_left_out():
    findings = [Finding(f"file {i}", "ok") for i in range(99)] + [Finding("bad", "is cut", broken=True)]
    report = Report([Section("Files", findings)])
    lines = report.text().splitlines()
    assert "! bad " in "\n".join(lines) and len(lines) < 40
    assert any("and 70 more, none of them broken" in line for line in lines)
    assert lines[-1] == "Result: 1 thing is BROKEN (marked !)."
    assert len(json.loads(json.dumps(report.as_dict()))["sections"][0]["findings"]) == 100
    assert Report([]).text().endswith("Result: nothing is broken.")


def test_folders_stay_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    home = tmp_path / "Joe Doe"
    monkeypatch.setenv("HOME", str(home))
    known = home / "my models" / "vae" / "x.safetensors"
    private, whole = Privacy([known]), Privacy([known], paths=True)
    for text in (f"There is no file {known}.", f"in {known.parent}; found none", f"'{home}/.cache/a b'"):
        assert "Joe" not in private(text) and "Joe" not in whole(text)
        assert "my models/" not in private(text)
    assert private(f"There is no file {known}.") == "There is no file x.safetensors."
    assert whole(f"There is no file {known}.") == "There is no file ~/my models/vae/x.safetensors."
    assert private("OSError: /usr/lib/joe/libcuda.so.1: cannot open") == "OSError: libcuda.so.1: cannot open"
    assert private(r"C:\Users\joe\models\a.gguf is cut") == "a.gguf is cut"
    assert private("Joe Doe/ (3 files) is cut") == "~/ (3 files) is cut"
    plain = "1.0 / 2.0 GB, https://huggingface.co/Comfy-Org/Lens, and/or 4/5"
    assert private(plain) == whole(plain) == plain


def test_an_error_is_one_line():
    assert sentence(SettingError("two\n  lines")) == "two lines"
    assert sentence(KeyError("x")) == "KeyError: 'x'"


class Cancelled(Exception):
    """As a host raises it: no error that the doctor knows."""


@pytest.mark.parametrize(
    "when", ["Looking at the computer", "Testing CUDA", "Looking at", "Reading", "Hashing", "Comparing"]
)
def test_cancel_stops_it_wherever_it_is(when: str, tiny_models: Path):
    def cancel(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if what.startswith(when):
            raise Cancelled

    examination = Examination(hashes=True, values=True, parity=True)
    with pytest.raises(Cancelled):
        check([tiny_models / "vae"], examination, cancel)
