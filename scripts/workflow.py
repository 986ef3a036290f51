"""Turns a workflow file, as the page saves it, into the prompt that the server runs.

The page does this itself; tests and the demo have no page. It covers what the example workflows
use: plain nodes with links and widgets, notes, and widgets followed by "control after generate".
"""

from __future__ import annotations

from typing import Any

NOTES = {"MarkdownNote", "Note"}
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """API prompt of a UI workflow; ``object_info`` is the server's description of its nodes."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = _widget_values(node, object_info[node["type"]])
        for slot in node.get("inputs", ()):
            if slot.get("link") is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def set_input(prompt: dict[str, Any], class_type: str, /, **values: Any) -> None:
    """Set inputs of every node of one type."""
    for node in prompt.values():
        if node["class_type"] == class_type:
            node["inputs"].update(values)


def _widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    values = iter(node.get("widgets_values", ()))
    result = {}
    for group in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(group, {}).items():
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in _WIDGETS) or options.get("forceInput"):
                continue
            # A file from before the node had this widget: the page takes its default.
            result[name] = next(values, options.get("default"))
            if options.get("control_after_generate"):
                next(values)
    return result
