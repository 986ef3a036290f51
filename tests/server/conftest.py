"""One real ComfyUI server with the pack and the tiny models, for all tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.comfy_server import ComfyServer
from tests.api_server import ApiServer, serving

# The key that the server's environment holds: it must be found nowhere else.
KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="session")
def api() -> Iterator[ApiServer]:
    """The language model's server that the ComfyUI server's environment names."""
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def server(
    tiny_models: Path, tmp_path_factory: pytest.TempPathFactory, api: ApiServer
) -> Iterator[ComfyServer]:
    """A running server; its models folder is a copy, which tests may add files to."""
    base = tmp_path_factory.mktemp("server")
    shutil.copytree(tiny_models, base / "tiny")
    (base / "comfy" / "custom_nodes").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("shortage_node.py"), base / "comfy" / "custom_nodes")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_API_KEY", KEY)
        environment.setenv("OPENAI_BASE_URL", api.url)
        with ComfyServer(base / "comfy", base / "tiny") as running:
            yield running
