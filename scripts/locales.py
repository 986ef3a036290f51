"""What the translations in ``locales`` lack, or say differently, compared with the nodes as they are.

    COMFYUI_PATH=... python -m scripts.locales             # list it; exit code 1 if there is any
    COMFYUI_PATH=... python -m scripts.locales --reviewed  # the translations have followed all changed texts

English has no locale files: the nodes' schemas are its one source. ``tests/fixtures/english.json`` holds the
English texts that the translations were made from, so that a changed one is noticed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[1]
LOCALES = PACK / "locales"
LANGUAGES = ("zh", "ja", "fr", "es")
REVIEWED = PACK / "tests" / "fixtures" / "english.json"

# What a translation keeps as it is: figures, folders, and names such as LensSampler or OPENAI_BASE_URL.
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FOLDER = re.compile(r"\w+/\w+")
_NAME = re.compile(r"\b[A-Z]\w*[a-z]\w*[A-Z]\w*?(?=s?\b)|\b[A-Z]+_[A-Z_]+\b")
# The page reads names and descriptions as messages with parameters; tooltips are shown as they are.
_SYNTAX = re.compile(r"[@{}|]")

Texts = dict[str, str]


def english_texts(object_info: dict[str, Any]) -> Texts:
    """Every text of the nodes that can be translated, by its place in ``nodeDefs.json``, such as
    ``LensSampler.inputs.cfg.tooltip``. ``object_info`` is the server's description of the nodes."""
    texts: Texts = {}
    for node_id, info in object_info.items():
        texts[f"{node_id}.display_name"] = info["display_name"]
        texts[f"{node_id}.description"] = info["description"]
        for name, entry in _inputs(info["input"]):
            texts[f"{node_id}.inputs.{name}.name"] = name
            texts[f"{node_id}.inputs.{name}.tooltip"] = entry[1].get("tooltip") or ""
        outputs = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
        for index, (name, kind, tooltip) in enumerate(outputs):
            if name != kind:  # the page has its own word for a type
                texts[f"{node_id}.outputs.{index}.name"] = name
            texts[f"{node_id}.outputs.{index}.tooltip"] = tooltip or ""
    return texts


def _inputs(groups: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list]]:
    """Inputs, those of a combo's options too; the page joins their names by an underscore."""
    for group in ("required", "optional"):
        for name, entry in groups.get(group, {}).items():
            yield prefix + name, entry
            for option in entry[1].get("options", ()) if len(entry) > 1 else ():
                if isinstance(option, dict):
                    yield from _inputs(option["inputs"], f"{prefix}{name}_")


def options(object_info: dict[str, Any]) -> dict[str, set[str]]:
    """The options of each combo, which the page shows untranslated, by the place of its tooltip."""
    return {
        f"{node_id}.inputs.{name}.tooltip": {str(option) for option in entry[1]["options"]}
        for node_id, info in object_info.items()
        for name, entry in _inputs(info["input"])
        if entry[0] == "COMBO"
    }


def translated_texts(language: str, file: str = "nodeDefs") -> Texts:
    """All texts of a locale file, by their places."""
    text = (LOCALES / language / f"{file}.json").read_text(encoding="utf-8")
    return dict(_flat(json.loads(text)))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def faults(english: Texts, translated: Texts, chosen: dict[str, set[str]]) -> list[str]:
    """What is wrong with a translation, a line each; ``chosen`` is what ``options`` gives."""
    lines = [f"missing: {place}: {english[place]}" for place in english.keys() - translated.keys()]
    lines += [f"stale: {place}" for place in translated.keys() - english.keys()]
    for place in english.keys() & translated.keys():
        lines += [
            f"{place}: {what}" for what in _differences(place, english[place], translated[place], chosen)
        ]
    return sorted(lines)


def _differences(place: str, english: str, translated: str, chosen: dict[str, set[str]]) -> Iterator[str]:
    kind = place.rpartition(".")[2]
    if not translated.strip():
        yield "empty"
    elif translated == english and kind in ("tooltip", "description"):
        yield "not translated"
    if kind == "name":
        kept: set[str] = set()
    else:
        numbers = [sorted(_NUMBER.findall(text)) for text in (english, translated)]
        if numbers[0] != numbers[1]:
            yield f"numbers {numbers[1]}, in English {numbers[0]}"
        kept = {*_FOLDER.findall(english), *_NAME.findall(english)}
        kept |= {option for option in chosen.get(place, ()) if f"{option}:" in english}
    lost = sorted(word for word in kept if word not in translated)
    if lost:
        yield f"without {', '.join(lost)}"
    if kind != "tooltip" and _SYNTAX.search(translated):
        yield "@, {, } and | mean something to the page here"


def changed(english: Texts) -> list[str]:
    """Texts that are no longer what the translations were made from."""
    reviewed = json.loads(REVIEWED.read_text(encoding="utf-8"))
    return sorted(
        f"changed in English since it was translated: {place}: {english[place]}"
        for place in english.keys() & reviewed.keys()
        if english[place] != reviewed[place]
    )


def _live_nodes() -> dict[str, Any]:
    """The server's description of this pack's nodes."""
    from scripts.comfy_server import ComfyServer

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with ComfyServer(base / "base", base / "models") as server:
            info = server.get("/object_info")
    return {node_id: entry for node_id, entry in info.items() if node_id.startswith("Lens")}


def main() -> int:
    """The command line; 1 if there is anything to do."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--reviewed", action="store_true", help="note today's English texts as those translated"
    )
    reviewed = parser.parse_args().reviewed
    info = _live_nodes()
    english, chosen = english_texts(info), options(info)
    if reviewed:
        text = json.dumps(english, indent=1, ensure_ascii=False)
        REVIEWED.write_text(text + "\n", encoding="utf-8")
    lines = changed(english)
    for language in LANGUAGES:
        lines += [f"{language}: {line}" for line in faults(english, translated_texts(language), chosen)]
    print("\n".join(lines) or "The translations are complete.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
