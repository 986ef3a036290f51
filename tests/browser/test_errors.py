"""What went wrong is said in words, with the node's help page one click away."""

from __future__ import annotations

import re

import pytest

from tests.browser.lens_page import LensPage, one_renderer

ERROR = """(detail) => app.api.dispatchEvent(new CustomEvent("execution_error", {detail: {
  prompt_id: "none", executed: [], traceback: [], current_inputs: {}, current_outputs: {}, ...detail}}))"""


def toast_with(page: LensPage, text: str):
    toast = page.page.locator(".p-toast-message", has_text=re.compile(text))
    toast.wait_for()
    return toast


def add(page: LensPage, node_type: str) -> str:
    return page.page.evaluate(
        """(type) => { const node = LiteGraph.createNode(type); node.pos = [300, 200]; app.rootGraph.add(node);
             return String(node.id) }""",
        node_type,
    )


def test_a_refused_choice_is_said_once_and_its_help_opens(page: LensPage) -> None:
    page.page.evaluate(
        """() => { const [loader, save] = ["LensModelLoader", "LensSaveModel"].map(
             (type) => { const node = LiteGraph.createNode(type); app.rootGraph.add(node); return node });
           loader.pos = [100, 200]; save.pos = [600, 200];
           loader.widgets[0].value = "no such file.safetensors";
           loader.connect(0, save, "model"); }"""
    )
    page.fit()
    assert page.run().status == "rejected"
    toast = toast_with(page, "There is no denoiser 'no such file.safetensors'")
    assert toast.count() == 1
    assert "Lens Model Loader" in toast.inner_text()
    assert "model_name - " not in toast.inner_text()
    toast.get_by_role("button", name="Help for Lens Model Loader").click()
    toast.wait_for(state="detached")
    assert page.page.evaluate("() => [...app.canvas.selectedItems].map((node) => node.type)") == [
        "LensModelLoader"
    ]
    page.page.locator(".node-help-content").wait_for()


@one_renderer
def test_an_error_while_running_is_said_in_its_own_words(page: LensPage) -> None:
    node = add(page, "LensSampler")
    detail = {
        "node_id": node,
        "node_type": "LensSampler",
        "exception_type": "pack.lens_core.errors.SizeError",
    }
    page.page.evaluate(ERROR, detail | {"exception_message": "1000x1000 pixels: both sides.\n"})
    assert "1000x1000 pixels: both sides." in toast_with(page, "Lens Sampler").inner_text()


@one_renderer
@pytest.mark.parametrize(
    ("kind", "message", "said"),
    [
        ("torch.OutOfMemoryError", "CUDA out of memory. Tried\nThis error means", "int8_dynamic"),
        ("p.lens_core.memory.recovery.OutOfMemory", "CUDA out of memory. Try 512x512.\nThis", "Try 512x512."),
    ],
)
def test_out_of_memory_names_settings(page: LensPage, kind: str, message: str, said: str) -> None:
    detail = {"node_id": add(page, "LensVAEDecode"), "node_type": "LensVAEDecode"}
    page.page.evaluate(ERROR, detail | {"exception_type": kind, "exception_message": message})
    text = toast_with(page, "Lens VAE Decode").inner_text()
    assert said in text
    assert "This" not in text


@one_renderer
def test_the_errors_of_others_and_cancel_are_left_to_the_page(page: LensPage) -> None:
    other = {"node_id": add(page, "EmptyImage"), "node_type": "EmptyImage"}
    page.page.evaluate(ERROR, other | {"exception_type": "ValueError", "exception_message": "no"})
    page.page.evaluate(
        "() => app.api.dispatchEvent(new CustomEvent('execution_interrupted', {detail: {prompt_id: 'none', "
        "node_id: '1', node_type: 'LensSampler', executed: []}}))"
    )
    page.page.wait_for_timeout(200)  # nothing is what is waited for
    assert page.toasts() == []


@one_renderer
def test_what_is_refused_for_several_inputs_is_said_once(page: LensPage) -> None:
    refusal = {"type": "custom_validation_failed", "message": "Custom validation failed for node"}
    errors = [
        refusal | {"details": f"{name} - Too - large.", "extra_info": {"input_name": name}}
        for name in ("steps", "cfg")
    ]
    said = page.page.evaluate(
        """async ([module, error]) => (await import(module)).refusals(error)""",
        [f"/extensions/{page.host.folder}/js/words_of_errors.js", {"errors": errors}],
    )
    assert said == ["Too - large."]
