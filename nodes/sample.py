"""Sampling: everything in one node, and its parts for SamplerCustomAdvanced."""

from comfy_api.latest import io

from ..lens_core.denoiser import NagOptions
from ..lens_core.sampling import BY_STEPS, DENOISE_BY
from .host.noise import BATCHES, HOST, KINDS, REFERENCE, TOGETHER, SeededNoise
from .host.sampling import make_guider, sample, sigmas_for

_CATEGORY = "Lens/sampling"
_MAX_SEED = 0xFFFFFFFFFFFFFFFF


def _model() -> io.Input:
    return io.Model.Input("model", tooltip="From LensModelLoader, or UNETLoader with a Lens file.")


def _positive() -> io.Input:
    return io.Conditioning.Input("positive", tooltip="What to draw, from LensTextEncode.")


def _negative() -> io.Input:
    return io.Conditioning.Input("negative", tooltip="What to avoid; at cfg 1 it needs nag_scale.")


def _latent() -> io.Input:
    return io.Latent.Input(
        "latent", tooltip="An empty latent (LensEmptyLatent), or a picture's to start from."
    )


def _seed() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=_MAX_SEED,
        control_after_generate=True,
        tooltip="The same seed with the same settings draws the same picture.",
    )


def _steps() -> io.Input:
    return io.Int.Input(
        "steps",
        default=20,
        min=1,
        max=1000,
        tooltip="20 for Lens, 4 for Turbo, 50 for Base; connect LensModelLoader's steps to follow it.",
    )


def _cfg() -> io.Input:
    return io.Float.Input(
        "cfg",
        default=5.0,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip=(
            "Guidance: how strictly the prompt is followed. 5 for Lens and Base (4 to 4.5 for "
            "photographs), 1 for Turbo, which then needs half the work."
        ),
    )


def _guided() -> list[io.Input]:
    """Start and end of the guided steps; optional, so that older workflows load."""
    meaning = (
        "Step i of n counts as i / n; outside start and end cfg is 1 and the negative is not evaluated, "
        "which halves the step's time."
    )
    common = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001, "optional": True, "advanced": True}
    return [
        io.Float.Input(
            "guidance_start", default=0.0, tooltip=f"Share of the steps before guidance. {meaning}", **common
        ),
        io.Float.Input(
            "guidance_end",
            default=1.0,
            tooltip=f"Share of the steps after which guidance ends. {meaning}",
            **common,
        ),
    ]


def _nag() -> list[io.Input]:
    """Normalised attention guidance; optional, so that older workflows load."""
    common = {"step": 0.01, "round": 0.001, "optional": True, "advanced": True}
    return [
        io.Float.Input(
            "nag_scale",
            default=0.0,
            min=0.0,
            max=50.0,
            step=0.1,
            round=0.01,
            optional=True,
            tooltip=(
                "For Turbo: at cfg 1, how far attention is moved away from the negative (normalised "
                "attention guidance, NAG). 0 is off, 4 a good start."
            ),
        ),
        io.Float.Input(
            "nag_tau",
            default=2.5,
            min=1.0,
            max=10.0,
            tooltip="How large a token's attention may become by nag_scale, relative to the prompt's own.",
            **common,
        ),
        io.Float.Input(
            "nag_alpha",
            default=0.25,
            min=0.0,
            max=1.0,
            tooltip="How much of the moved attention is used; the rest is the prompt's own.",
            **common,
        ),
    ]


def _denoise() -> io.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip=(
            "1 draws from noise, whatever the latent holds. Below 1 the last part of a longer schedule runs "
            "on the given latent, always all of steps; denoise_by says which part. 0 returns it unchanged."
        ),
    )


def _denoise_by() -> io.Input:
    """Optional, so that older workflows load."""
    return io.Combo.Input(
        "denoise_by",
        options=list(DENOISE_BY),
        default=BY_STEPS,
        optional=True,
        tooltip=(
            "What denoise is a share of. steps: of the steps, as other samplers count (0.5: the second half "
            "of twice the steps, which begins with 0.8 to 0.9 of noise). noise level: of the noise: it "
            "starts at the step whose sigma is nearest denoise (0.5: half noise, half picture)."
        ),
    )


def _kind(default: str, **more) -> io.Input:
    return io.Combo.Input(
        "noise",
        options=list(KINDS),
        default=default,
        tooltip=(
            "host: ComfyUI's noise, the same on every machine. reference: the published "
            "program's, for its pictures from its seeds (differs between CPU and GPU)."
        ),
        **more,
    )


class LensSampler(io.ComfyNode):
    """Model, conditioning and latent -> LATENT, with Lens' schedule and guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensSampler",
            display_name="Lens Sampler",
            category=_CATEGORY,
            description=(
                "Draws with the schedule that Lens uses for this size and number of steps, Euler "
                "steps, and guidance rescaled to the prompt's own strength."
            ),
            search_aliases=["microsoft lens", "ksampler", "text to image"],
            inputs=[
                _model(),
                _positive(),
                _negative(),
                _latent(),
                _seed(),
                _steps(),
                _cfg(),
                _kind(HOST),
                _denoise(),
                *_guided(),
                _denoise_by(),
                io.Noise.Input(
                    "custom_noise",
                    optional=True,
                    tooltip="From LensNoise or another node: taken instead of seed and noise.",
                ),
                *_nag(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="For LensVAEDecode.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        seed,
        steps,
        cfg,
        noise,
        denoise,
        guidance_start=0.0,
        guidance_end=1.0,
        denoise_by=BY_STEPS,
        custom_noise=None,
        nag_scale=0.0,
        nag_tau=2.5,
        nag_alpha=0.25,
    ) -> io.NodeOutput:
        settings = {"seed": seed, "steps": steps, "cfg": cfg, "noise": noise, "denoise": denoise}
        settings |= {"denoise_by": denoise_by, "custom_noise": custom_noise}
        settings["node_id"] = getattr(cls.hidden, "unique_id", None)
        settings["guided"] = (guidance_start, guidance_end)
        settings["nag"] = NagOptions(nag_scale, nag_tau, nag_alpha)
        return io.NodeOutput(sample(model, positive, negative, latent, **settings))


class LensScheduler(io.ComfyNode):
    """Steps and size -> SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensScheduler",
            display_name="Lens Scheduler",
            category=_CATEGORY,
            description="Lens' noise levels for a latent's size, for SamplerCustomAdvanced.",
            search_aliases=["microsoft lens", "sigmas", "schedule", "mu"],
            inputs=[_steps(), _latent(), _denoise(), _denoise_by()],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="steps + 1 levels, down to 0.")],
        )

    @classmethod
    def execute(cls, steps, latent, denoise, denoise_by=BY_STEPS) -> io.NodeOutput:
        return io.NodeOutput(sigmas_for(latent, steps, denoise, denoise_by))


class LensGuider(io.ComfyNode):
    """Model and conditioning -> GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensGuider",
            display_name="Lens Guider",
            category=_CATEGORY,
            description="Guidance rescaled to the prompt's own strength, for SamplerCustomAdvanced.",
            search_aliases=["microsoft lens", "cfg", "guidance"],
            inputs=[_model(), _positive(), _negative(), _cfg(), *_guided(), *_nag()],
            outputs=[io.Guider.Output(display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        cfg,
        guidance_start=0.0,
        guidance_end=1.0,
        nag_scale=0.0,
        nag_tau=2.5,
        nag_alpha=0.25,
    ) -> io.NodeOutput:
        guided, nag = (guidance_start, guidance_end), NagOptions(nag_scale, nag_tau, nag_alpha)
        return io.NodeOutput(make_guider(model, positive, negative, cfg, guided, nag))


class LensNoise(io.ComfyNode):
    """Seed, and a second one for variations -> NOISE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensNoise",
            display_name="Lens Noise",
            category=_CATEGORY,
            description=(
                "Starting noise: the published program's for a seed, or ComfyUI's; between those of two "
                "seeds, for variations of a picture; with a seed of its own for each picture of a batch. For "
                "LensSampler or SamplerCustomAdvanced."
            ),
            search_aliases=["microsoft lens", "seed", "random noise", "variation", "subseed", "slerp"],
            inputs=[
                _seed(),
                io.Int.Input(
                    "variation_seed",
                    default=0,
                    min=0,
                    max=_MAX_SEED,
                    optional=True,
                    tooltip="The other seed, which variation_strength goes towards.",
                ),
                io.Float.Input(
                    "variation_strength",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="0: the noise of seed, bit for bit. 1: of variation_seed. Between: a mixture.",
                ),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default=TOGETHER,
                    optional=True,
                    tooltip=(
                        "The pictures of a batch. together: drawn from one seed, as ComfyUI and the "
                        "published program do. consecutive seeds: each is what its own seed, one more than "
                        "the one before, draws alone. consecutive variations: one seed, variation_seed "
                        "counts up."
                    ),
                ),
                _kind(REFERENCE, optional=True),
            ],
            outputs=[
                io.Noise.Output(
                    display_name="NOISE", tooltip="For LensSampler's custom_noise or SamplerCustomAdvanced."
                )
            ],
        )

    @classmethod
    def execute(
        cls, seed, variation_seed=0, variation_strength=0.0, batch=TOGETHER, noise=REFERENCE
    ) -> io.NodeOutput:
        return io.NodeOutput(SeededNoise(seed, noise, variation_seed, variation_strength, batch))
