"""The pack loads and its nodes draw a picture, in a real ComfyUI."""

from __future__ import annotations


def test_our_nodes_draw_a_picture(host, load_tiny):
    model, clip, vae = load_tiny()
    positive, negative = host.run("LensTextEncode", clip=clip, prompt="a red circle", negative="")
    latent, width, height = host.run(
        "LensEmptyLatent", base_resolution="512", aspect_ratio="9:16", batch_size=1
    )
    (samples,) = host.run(
        "LensSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent=latent,
        seed=1,
        steps=2,
        cfg=5.0,
        noise="host",
        denoise=1.0,
    )
    (image,) = host.run("LensVAEDecode", latent=samples, vae=vae)
    assert image.shape == (1, height, width, 3) == (1, 688, 384, 3)
    assert 0 <= image.min() < image.max() <= 1
    assert image.std() > 0.05, "a flat picture"
