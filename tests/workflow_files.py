"""The workflow files that come with the pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[1]
TEMPLATES = sorted((PACK / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
WORKFLOWS = [*TEMPLATES, *BLUEPRINTS]


def nodes_of(path: Path) -> list[dict[str, Any]]:
    """All nodes of a workflow file, those inside its subgraphs too."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    inner = workflow.get("definitions", {}).get("subgraphs", [])
    return [node for graph in (workflow, *inner) for node in graph["nodes"]]
