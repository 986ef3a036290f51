"""Many pictures side by side, to compare prompts, seeds and checkpoints."""

from comfy_api.latest import io

from ..lens_core.grid import AUTO, COLUMNS
from ..lens_core.quant.policy import CHOICES, NONE
from ..lens_core.sampling import ASPECT_RATIOS
from .host import paths
from .host.choice import check_choices
from .host.grid import draw_grid
from .host.settings import listed
from .latent import base_resolution


class LensGrid(io.ComfyNode):
    """Prompts x seeds x models -> one labelled contact sheet, and its pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensGrid",
            display_name="Lens Grid",
            category="Lens/sampling",
            description=(
                "Draws every prompt with every seed and every checkpoint or quantisation, and puts the "
                "pictures side by side with their labels. Each prompt is encoded once and each checkpoint "
                "loaded once. A picture is the one that LensSampler draws with these settings."
            ),
            search_aliases=["microsoft lens", "xy plot", "contact sheet", "compare", "grid", "text to image"],
            inputs=[
                io.Clip.Input("clip", tooltip="From LensEncoderLoader, or CLIPLoader with type 'lens'."),
                io.Vae.Input("vae", tooltip="From LensVAELoader, or VAELoader with flux2-vae."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Drawn first, before the checkpoints: one with a LoRA, for example.",
                ),
                io.String.Input("prompts", multiline=True, tooltip="One prompt a line."),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What to avoid in all pictures; without effect at cfg 1.",
                ),
                io.String.Input(
                    "seeds", default="1-4", tooltip="Numbers and ranges: 1, 2, 3 or 5-8 or both."
                ),
                *_models(),
                base_resolution(),
                io.Combo.Input(
                    "aspect_ratio", options=list(ASPECT_RATIOS), default="1:1", tooltip="Width to height."
                ),
                *_numbers(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="All pictures and their labels in one."),
                io.Image.Output(
                    display_name="images",
                    tooltip="The single pictures: by model first, then by prompt, then by seed.",
                ),
                io.String.Output(display_name="labels", tooltip="A line for each of the single pictures."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoints=None):
        """Instead of ComfyUI's "not in list"."""
        return check_choices("denoiser", checkpoints)

    @classmethod
    def fingerprint_inputs(cls, checkpoints=None, **_):
        """A file replaced under its name is opened again."""
        return "".join(paths.stamp("denoiser", name) for name in listed("checkpoints", checkpoints))

    @classmethod
    def execute(
        cls,
        clip,
        vae,
        prompts: str,
        seeds: str,
        base_resolution: str,
        aspect_ratio: str,
        model=None,
        negative: str = "",
        checkpoints=None,
        quantizations=None,
        steps: int = 0,
        cfg: float = 0.0,
        columns: str = AUTO,
    ) -> io.NodeOutput:
        drawn = draw_grid(
            clip,
            vae,
            model,
            prompts=prompts,
            negative=negative,
            seeds=seeds,
            checkpoints=listed("checkpoints", checkpoints),
            quantizations=listed("quantizations", quantizations),
            size=(int(base_resolution), aspect_ratio),
            steps=steps,
            cfg=cfg,
            columns=columns,
            node_id=getattr(cls.hidden, "unique_id", None),
        )
        return io.NodeOutput(*drawn)


def _models() -> list[io.Input]:
    return [
        io.MultiCombo.Input(
            "checkpoints",
            options=paths.choices("denoiser"),
            default=[],
            optional=True,
            tooltip="Those of LensModelLoader's list to compare; none where a model is connected.",
        ),
        io.MultiCombo.Input(
            "quantizations",
            options=list(CHOICES),
            default=[NONE],
            optional=True,
            tooltip="Each checkpoint is drawn in each of these, as LensModelLoader would load it.",
        ),
    ]


def _numbers() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="0: each checkpoint's own, 20 for Lens, 4 for Turbo, 50 for Base.",
        ),
        io.Float.Input(
            "cfg",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            optional=True,
            tooltip="0: each checkpoint's own, 5 for Lens and Base, 1 for Turbo.",
        ),
        io.Combo.Input(
            "columns",
            options=list(COLUMNS),
            default=AUTO,
            optional=True,
            tooltip="What lies side by side. auto: models if there are several, else seeds.",
        ),
    ]
