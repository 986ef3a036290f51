"""Choosing a checkpoint sets steps and cfg where nothing is wired, as one step of undo."""

from __future__ import annotations

import re

from tests.browser.lens_page import LensPage, one_renderer

LENS, TURBO = "lens_tiny_bf16.safetensors", "lens_turbo_tiny_bf16.safetensors"
# A loader, a LoRA, a sampler; a guider and a scheduler at a stock sampler; a sampler without a model.
BUILD = """([lens, wired]) => {
  const add = (type) => { const node = LiteGraph.createNode(type); app.rootGraph.add(node); return node };
  const [loader, lora, sampler, guider, custom, scheduler, stranger] = ["LensModelLoader", "LensLoraLoader",
    "LensSampler", "LensGuider", "SamplerCustomAdvanced", "LensScheduler", "LensSampler"].map(add);
  stranger.title = "Stranger";
  loader.widgets[0].value = lens;
  loader.connect(0, lora, "model");
  lora.connect(0, sampler, "model");
  lora.connect(0, guider, "model");
  guider.connect(0, custom, "guider");
  scheduler.connect(0, custom, "sigmas");
  for (const name of wired)
    loader.connect(loader.outputs.findIndex((output) => output.name === name), sampler, name);
  app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState();
}"""
VALUES = """() => Object.fromEntries(app.rootGraph.nodes.flatMap((node) => (node.widgets ?? [])
  .filter(({name}) => name === "steps" || name === "cfg")
  .map(({name, value}) => [`${node.title} ${name}`.replace("Lens ", ""), value])))"""
USUAL = {"Sampler steps": 20, "Sampler cfg": 5, "Scheduler steps": 20, "Guider cfg": 5}
USUAL |= {"Stranger steps": 20, "Stranger cfg": 5}
TURBOS = {"Sampler steps": 4, "Sampler cfg": 1, "Scheduler steps": 4, "Guider cfg": 1}


def build(page: LensPage, *wired: str) -> None:
    page.page.evaluate(BUILD, [LENS, wired])


def choose(page: LensPage, name: str) -> None:
    page.set_widgets("LensModelLoader", model_name=name)


def test_a_choice_sets_what_follows_from_it_and_one_undo_takes_it_back(page: LensPage) -> None:
    build(page)
    choose(page, TURBO)
    toast = page.page.locator(".p-toast-message", has_text="Turbo")
    toast.wait_for()
    assert page.page.evaluate(VALUES) == USUAL | TURBOS
    text = toast.inner_text()
    assert "4 steps, cfg 1 set in Lens Sampler" in text
    assert "cfg 1 set in Lens Guider" in text
    assert "4 steps set in Lens Scheduler" in text

    page.command("Comfy.Undo")
    page.page.wait_for_function(f"() => ({VALUES})()['Sampler steps'] === 20")
    assert page.page.evaluate(VALUES) == USUAL
    assert page.widget("LensModelLoader", "model_name") == LENS


@one_renderer
def test_wired_samplers_are_left_alone(page: LensPage) -> None:
    build(page, "steps", "cfg")
    choose(page, TURBO)
    page.page.locator(".p-toast-message", has_text=re.compile("set in Lens Scheduler")).wait_for()
    sampler = {name: value for name, value in USUAL.items() if name.startswith("Sampler")}
    assert page.page.evaluate(VALUES) == USUAL | TURBOS | sampler


@one_renderer
def test_a_setting_turns_it_off_and_loading_a_file_chooses_nothing(page: LensPage) -> None:
    build(page)
    page.set_setting("Lens.FollowPreset", False)
    choose(page, TURBO)
    page.set_setting("Lens.FollowPreset", True)
    page.load(page.graph())
    page.page.wait_for_timeout(200)  # nothing is what is waited for
    assert page.page.evaluate(VALUES) == USUAL
    assert page.toasts() == []


@one_renderer
def test_it_goes_into_subgraphs(page: LensPage) -> None:
    build(page)
    page.page.evaluate(
        """() => { const inside = ["LensLoraLoader", "LensSampler", "LensGuider"];
             app.canvas.selectItems(app.rootGraph.nodes.filter(
               (node) => inside.includes(node.type) && node.title !== "Stranger"));
             app.rootGraph.convertToSubgraph(app.canvas.selectedItems); }"""
    )
    choose(page, TURBO)
    inner = page.page.evaluate(
        "() => app.rootGraph.nodes.find((node) => node.subgraph).subgraph.nodes.flatMap((node) => "
        "node.widgets.filter(({name}) => name === 'steps' || name === 'cfg').map(({value}) => value))"
    )
    assert sorted(inner) == [1, 1, 4]
    outside = page.page.evaluate(VALUES)
    assert outside == {name: value for name, value in USUAL.items() if "Stranger" in name} | {
        "Scheduler steps": 4
    }
