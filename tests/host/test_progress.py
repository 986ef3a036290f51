"""Progress bars move, previews appear, and Cancel stops every long stage at once."""

from __future__ import annotations

import pytest
import torch

from lens_core.config import CAPTURED_LAYERS
from lens_core.tiny import models

LAYERS = max(CAPTURED_LAYERS) + 1


@pytest.fixture
def cancel(host):
    """Presses Cancel; whatever happens, the button is up again after the test."""
    import comfy.model_management as management

    yield lambda: management.interrupt_current_processing(True)
    management.interrupt_current_processing(False)


@pytest.fixture
def interrupted(host):
    import comfy.model_management as management

    return management.InterruptProcessingException


class CancelAfter:
    """A progress hook that presses Cancel at the first report from ``done`` on, and notes the last."""

    def __init__(self, cancel, done: int) -> None:
        self.cancel, self.done, self.last = cancel, done, 0
        self.pressed = False

    def __call__(self, done, total, preview, node_id=None) -> None:
        self.last = done
        if done >= self.done and not self.pressed:
            self.pressed = True
            self.cancel()


@pytest.fixture
def cancel_after(cancel, progress):
    """Cancels when progress reaches a number; ``progress`` puts the former hook back afterwards."""
    import comfy.utils

    def install(done: int) -> CancelAfter:
        hook = CancelAfter(cancel, done)
        comfy.utils.set_progress_bar_global_hook(hook)
        return hook

    return install


def test_sampling_reports_every_step(draw, progress):
    draw(steps=5)
    bars = [(done, total) for done, total, preview in progress if preview is None]
    assert bars == [(step, 5) for step in range(1, 6)]


def test_sampling_without_steps_reports_nothing(draw, progress):
    draw(latent={"samples": torch.ones(1, 128, 6, 4)}, denoise=0.0)
    assert not progress


def test_encoding_reports_every_layer(host, tiny, progress):
    tiny.clip.load_model()  # reads the file, if no test has needed it before
    progress.clear()
    host.run("CLIPTextEncode", clip=tiny.clip, text="x")
    assert [(done, total) for done, total, _ in progress] == [(i, LAYERS) for i in range(1, LAYERS + 1)]


@pytest.mark.parametrize(
    "node, inputs",
    [
        ("LensModelLoader", {"model_name": "Lens-tiny", "dtype": "float32"}),
        ("LensVAELoader", {"vae_name": "flux2_tiny_vae.safetensors"}),
    ],
)
def test_loading_reports_and_is_cancelled(host, progress, cancel_after, interrupted, node, inputs):
    import comfy.utils

    host.run(node, **inputs)
    done = [report[0] for report in progress]
    total = progress[-1][1]
    assert done == sorted(done) and done[-1] == total > 50
    hook = cancel_after(total // 2)
    with pytest.raises(interrupted):
        host.run(node, **inputs)
    assert hook.last == total // 2, "another tensor was read"
    comfy.utils.set_progress_bar_global_hook(None)
    assert host.run(node, **inputs)[0] is not None


def test_opening_the_encoder_reads_nothing(host, progress):
    """Its header is read at once; its tensors, with a bar, when a prompt needs them."""
    (clip,) = host.run("LensEncoderLoader", encoder_name="gpt_oss_tiny_mxfp4.safetensors")
    assert not progress
    assert all(tensor.is_meta for tensor in clip.cond_stage_model.state_dict().values())
    clip.load_model()
    total = progress[-1][1]
    assert [report[0] for report in progress] == list(range(1, total + 1)) and total > 50


def test_cancel_before_loading(host, cancel, interrupted):
    cancel()
    with pytest.raises(interrupted):
        host.run("LensVAELoader", vae_name="flux2_tiny_vae.safetensors")


def test_cancel_while_encoding(host, tiny, cancel_after, interrupted):
    tiny.clip.load_model()
    hook = cancel_after(LAYERS // 2)
    with pytest.raises(interrupted):
        host.run("LensTextEncode", clip=tiny.clip, prompt="a red circle", negative="")
    assert hook.last == LAYERS // 2, "another layer ran"
    positive, _ = host.run("LensTextEncode", clip=tiny.clip, prompt="a red circle", negative="")
    assert torch.equal(positive[0][0], tiny.positive[0][0])


def test_cancel_while_sampling(draw, cancel_after, interrupted):
    want = draw(steps=6)["samples"]
    hook = cancel_after(3)
    with pytest.raises(interrupted):
        draw(steps=6)
    assert hook.last == 3, "another step ran"
    assert torch.equal(draw(steps=6)["samples"], want)


def test_cancel_within_a_forward(draw, tiny, cancel, interrupted):
    """A step of the real model takes seconds: the block in which Cancel is pressed is the last."""
    model, blocks = tiny.model.clone(), []

    def press(args):
        blocks.append(args["block_index"])
        cancel()
        return {"img": args["img"], "txt": args["txt"]}

    model.set_model_double_block_patch(press)
    with pytest.raises(interrupted):
        draw(model=model)
    assert blocks == [0] and models.DENOISER.num_layers > 1


@pytest.mark.parametrize("part, node", [("decoder", "LensVAEDecode"), ("encoder", "VAEEncode")])
def test_cancel_within_the_vae(host, tiny, cancel, interrupted, part, node):
    """On a CPU a large picture takes the VAE minutes; ComfyUI's own VAEs stop at the next layer."""
    inputs = {
        "LensVAEDecode": {"latent": {"samples": torch.zeros(1, 128, 6, 4)}},
        "VAEEncode": {"pixels": torch.rand(1, 96, 64, 3)},
    }[node]
    (want,) = host.run(node, vae=tiny.vae, **inputs)
    reached = []

    def press(layer, *_) -> None:
        reached.append(layer)
        cancel()

    model = tiny.vae.first_stage_model.model
    # Those that are called as modules; of a decode's last layers none is.
    layers = {
        "decoder": [model.decoder.conv_in, model.decoder.mid_block.attentions[0].to_q],
        "encoder": [model.encoder.mid_block.attentions[0].to_q, model.quant_conv],
    }[part]
    handles = [layer.register_forward_hook(press) for layer in layers]
    try:
        with pytest.raises(interrupted):
            host.run(node, vae=tiny.vae, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert reached == layers[:1], "it ran to its end"
    (again,) = host.run(node, vae=tiny.vae, **inputs)
    pair = (again, want) if node == "LensVAEDecode" else (again["samples"], want["samples"])
    assert torch.equal(*pair)


@pytest.fixture
def preview_method(host):
    """Chooses ComfyUI's preview method for the test."""
    import latent_preview

    yield latent_preview.set_preview_method
    latent_preview.set_preview_method()


def sampler_custom_advanced(host, tiny, **changes):
    """Three steps by ComfyUI's sampler with our guider."""
    latent = {"samples": torch.zeros(1, 128, 6, 4)}
    (guider,) = host.run(
        "LensGuider", model=tiny.model, positive=tiny.positive, negative=tiny.negative, cfg=5.0, **changes
    )
    (noise,) = host.run("RandomNoise", noise_seed=1)
    (sampler,) = host.run("KSamplerSelect", sampler_name="euler")
    (sigmas,) = host.run("LensScheduler", steps=3, latent=latent, denoise=1.0)
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}
    host.run("SamplerCustomAdvanced", latent_image=latent, **inputs)


@pytest.fixture(params=["LensSampler", "LensGuider", "LensGuider in a part of the steps"])
def three_steps(request, host, tiny, draw):
    """Draws at 96 x 64 pixels."""
    part = {"guidance_start": 0.5} if "part" in request.param else {}
    if request.param == "LensSampler":
        return lambda: draw(steps=3)
    return lambda: sampler_custom_advanced(host, tiny, **part)


def pictures(progress):
    return [preview for _, _, preview in progress if preview is not None]


@pytest.mark.parametrize("method", ["default", "auto", "latent2rgb"])
def test_previews(three_steps, progress, preview_method, method):
    """One small picture a step, at the size of the VAE's latents (half the packing), whoever makes it."""
    preview_method(method)
    three_steps()
    assert len(pictures(progress)) == 3
    for kind, image, _ in pictures(progress):
        assert kind == "JPEG" and image.size == (2 * 4, 2 * 6)
        low, high = zip(*image.getextrema(), strict=True)
        assert max(high) > min(low), "a flat preview"


def test_our_previews_are_comfyuis(draw, progress, preview_method):
    seen = []
    for method in ("default", "latent2rgb"):
        preview_method(method)
        draw(steps=3)
        seen.append([image.tobytes() for _, image, _ in pictures(progress)])
        progress.clear()
    assert seen[0] == seen[1] and len(set(seen[0])) == 3


@pytest.fixture
def page_wants(host, monkeypatch):
    """Makes a prompt run that the page sent with a preview method."""
    from types import SimpleNamespace

    from server import PromptServer

    def send(method: str) -> None:
        running = [(0, "id", {}, {"preview_method": method}, ["9"], {})]
        queue = SimpleNamespace(get_current_queue_volatile=lambda: (running, []))
        page = SimpleNamespace(prompt_queue=queue)
        monkeypatch.setattr(PromptServer, "instance", page, raising=False)

    return send


@pytest.mark.parametrize("method, count", [("none", 0), ("default", 3)])
def test_no_previews_for_a_page_that_wants_none(
    three_steps, progress, preview_method, page_wants, method, count
):
    preview_method(method)
    page_wants(method)
    three_steps()
    assert len(pictures(progress)) == count


@pytest.mark.parametrize(
    "start, count",
    [
        (["--preview-method", "none"], 0),
        (["--preview-method=none"], 0),
        (["--cpu", "--preview-size", "256"], 3),
    ],
    ids=["none", "none, joined", "another flag"],
)
def test_no_previews_by_a_server_started_so(host, draw, progress, monkeypatch, start, count):
    import comfy.options

    monkeypatch.setattr(comfy.options, "args_parsing", True)
    monkeypatch.setattr("sys.argv", ["main.py", *start])
    chosen = host.module("nodes.host.preview")._chosen_at_start
    chosen.cache_clear()
    try:
        draw(steps=3)
    finally:
        chosen.cache_clear()
    assert len(pictures(progress)) == count


def test_a_tiny_decoder_makes_previews_where_it_is_chosen(
    draw, progress, preview_method, tmp_path, monkeypatch
):
    """ComfyUI's own: the same size as the picture."""
    import folder_paths
    from comfy.taesd.taesd import DecoderFlux2
    from safetensors.torch import save_file

    folders, extensions = folder_paths.folder_names_and_paths["vae_approx"]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "vae_approx", ([*folders, str(tmp_path)], extensions)
    )
    weights = {name: torch.randn_like(value) / 24 for name, value in DecoderFlux2().state_dict().items()}
    save_file(weights, tmp_path / "taef2_decoder.safetensors")
    preview_method("taesd")
    draw(steps=3)
    assert [image.size for _, image, _ in pictures(progress)] == 3 * [(16 * 4, 16 * 6)]


def test_latents_of_unknown_colours_have_no_previews(host, progress):
    from types import SimpleNamespace

    latents = host.module("nodes.host.model").PackedLatents(32)
    patcher, steps = SimpleNamespace(model=SimpleNamespace(latent_format=latents)), []
    callback = host.module("nodes.host.preview").with_previews(lambda *step: steps.append(step), patcher, 4)
    callback(0, torch.zeros(1, 32, 2, 2), None, 4)
    assert len(steps) == 1 and not progress
