"""The translations: complete, of today's texts, and with the same figures and names in all languages."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from scripts import locales
from scripts.locales import LANGUAGES, PACK, Texts, changed, english_texts, faults, options, translated_texts

# Ids in users' settings files; those in the page's scripts are among them.
SETTINGS = {
    "Lens.DefaultCheckpoint",
    "Lens.DefaultQuantization",
    "Lens.FeatureCacheGB",
    "Lens.ClearFeatureCache",
    "Lens.DatePolicy",
    "Lens.ReasonerEndpoint",
    "Lens.FollowPreset",
}
COMMANDS = {"Lens.ClearFeatureCache", "Lens.HelpForFailedNode", "Lens.UseOwnNodes"}


@pytest.fixture(scope="module")
def nodes(host) -> dict[str, Any]:
    """The server's description of this pack's nodes."""
    return {
        node_id: node.GET_NODE_INFO_V1()
        for node_id, node in host.node_classes.items()
        if node_id.startswith("Lens")
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_are_translated(nodes, language):
    assert faults(english_texts(nodes), translated_texts(language), options(nodes)) == []


def test_translations_are_of_todays_english(nodes):
    """Where this fails, translate what it lists, then ``python -m scripts.locales --reviewed``."""
    assert changed(english_texts(nodes)) == []


CFG = "LensSampler.inputs.cfg.tooltip"
PLACEMENT = "LensEncoderLoader.inputs.placement.tooltip"


@pytest.mark.parametrize(
    ("place", "text", "fault"),
    [
        (CFG, None, "missing: "),
        ("LensSampler.inputs.gone.tooltip", "parti", "stale: "),
        (CFG, " ", "empty"),
        (CFG, "{english}", "not translated"),
        (CFG, "{fr} 7", "numbers"),
        (PLACEMENT, "{fr:stream:flux}", "without stream"),
        ("LensVAELoader.inputs.vae_name.tooltip", "{fr:models/vae:modèles}", "without models/vae"),
        ("LensSampler.outputs.0.tooltip", "Pour le décodeur.", "without LensVAEDecode"),
        ("LensReasonerAPI.description", "{fr:OPENAI_API_KEY:X}", "without OPENAI_API_KEY"),
        ("LensSampler.display_name", "Lens | x", "mean something"),
        ("LensSampler.description", "Écrire à @lens.", "mean something"),
    ],
)
def test_each_fault_is_found(nodes, place, text, fault):
    english, french = english_texts(nodes), translated_texts("fr")
    if text is None:
        del french[place]
    else:
        french[place] = _spoilt(text, english.get(place, ""), french.get(place, ""))
    (line, *_) = faults(english, french, options(nodes))
    assert fault in line and place in line


def _spoilt(template: str, english: str, french: str) -> str:
    """``{fr:a:b}`` is the French text with b for a."""
    if (replace := re.fullmatch(r"\{fr:(.*):(.*)\}", template)) is not None:
        assert replace[1] in french
        return french.replace(replace[1], replace[2])
    return template.replace("{english}", english).replace("{fr}", french)


def test_a_changed_text_is_found(nodes):
    english = english_texts(nodes)
    (line,) = changed({**english, CFG: "Another meaning."})
    assert CFG in line and "Another meaning." in line


def test_inputs_of_options_are_found():
    """The page joins their names by an underscore."""
    option = {"key": "turbo", "inputs": {"required": {"steps": ["INT", {"tooltip": "How many."}]}}}
    node: dict[str, Any] = {"display_name": "X", "description": "Y."}
    node["input"] = {"required": {"preset": ["COMFY_DYNAMICCOMBO_V3", {"options": [option]}]}}
    node |= {"output_name": [], "output": [], "output_tooltips": []}
    assert english_texts({"LensX": node})["LensX.inputs.preset_steps.tooltip"] == "How many."


@pytest.mark.parametrize("language", LANGUAGES)
def test_settings_and_commands_are_translated(language):
    settings, commands = (translated_texts(language, name) for name in ("settings", "commands"))
    names = {key for key in settings if ".options." not in key}
    assert names == {f"{id_.replace('.', '_')}.{text}" for id_ in SETTINGS for text in ("name", "tooltip")}
    assert set(commands) == {f"{id_.replace('.', '_')}.label" for id_ in COMMANDS}
    for text in (*settings.values(), *commands.values()):
        assert text.strip() and not re.search(r"[@{}|]", text)


def test_the_pages_settings_are_those():
    """Every id and heading in the page's scripts has a translation."""
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in (PACK / "web").rglob("*.js"))
    assert set(re.findall(r'"(Lens\.[A-Z]\w*)"', scripts)) <= SETTINGS | COMMANDS
    headings = set(re.findall(r'category: \["Lens", "([^"]+)"', scripts))
    for language in LANGUAGES:
        translated = translated_texts(language, "main")
        assert headings <= {key.removeprefix("settingsCategories.") for key in translated}


@pytest.mark.parametrize("file", ["nodeDefs", "settings", "commands", "main"])
@pytest.mark.parametrize("pair", itertools.combinations(LANGUAGES, 2), ids="-".join)
def test_no_language_stands_in_for_another(file, pair):
    """The same places; the same figures; no sentence twice. French and Spanish share "De LensModelLoader"."""
    one, other = (translated_texts(language, file) for language in pair)
    assert one.keys() == other.keys()
    for place in one:
        texts: Texts = {language: text[place] for language, text in zip(pair, (one, other), strict=True)}
        numbers = {language: sorted(re.findall(r"\d+(?:\.\d+)?", text)) for language, text in texts.items()}
        assert numbers[pair[0]] == numbers[pair[1]], place
        if len(one[place]) > 40:
            assert one[place] != other[place], place


def test_english_has_no_files():
    """Names and tooltips in Python are the one source."""
    assert sorted(path.name for path in locales.LOCALES.iterdir()) == sorted(LANGUAGES)
