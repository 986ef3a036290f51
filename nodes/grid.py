"""Many pictures side by side, to compare prompts, seeds and checkpoints."""

from comfy_api.latest import io

from ..lens_core.grid import AUTO, COLUMNS
from ..lens_core.quant.policy import NONE
from ..lens_core.sampling import ASPECT_RATIOS
from .host import paths
from .host.choice import check_choice
from .host.grid import NO_CHECKPOINT, checkpoint_options, draw_grid
from .latent import base_resolution

_CHECKPOINTS = ("checkpoint_1", "checkpoint_2", "checkpoint_3", "checkpoint_4")


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
                io.String.Input("prompts", multiline=True, tooltip="One prompt a line."),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    tooltip="What to avoid in all pictures; without effect at cfg 1.",
                ),
                io.String.Input(
                    "seeds", default="1-4", tooltip="Numbers and ranges: 1, 2, 3 or 5-8 or both."
                ),
                base_resolution(),
                io.Combo.Input(
                    "aspect_ratio", options=list(ASPECT_RATIOS), default="1:1", tooltip="Width to height."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Drawn first, before the checkpoints: one with a LoRA, for example.",
                ),
                *_models(),
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
    def validate_inputs(cls, checkpoint_1=None, checkpoint_2=None, checkpoint_3=None, checkpoint_4=None):
        """Instead of ComfyUI's "not in list"."""
        named = (checkpoint_1, checkpoint_2, checkpoint_3, checkpoint_4)
        answers = [check_choice("denoiser", name) for name in named if name != NO_CHECKPOINT]
        return next((answer for answer in answers if answer is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        """A file replaced under its name is opened again."""
        return [paths.stamp("denoiser", inputs.get(name)) for name in _CHECKPOINTS]

    @classmethod
    def execute(
        cls,
        clip,
        vae,
        prompts: str,
        negative: str,
        seeds: str,
        base_resolution: str,
        aspect_ratio: str,
        model=None,
        quantizations: str = NONE,
        steps: int = 0,
        cfg: float = 0.0,
        columns: str = AUTO,
        **checkpoints: str,
    ) -> io.NodeOutput:
        drawn = draw_grid(
            clip,
            vae,
            model,
            prompts=prompts,
            negative=negative,
            seeds=seeds,
            checkpoints=[checkpoints.get(name, NO_CHECKPOINT) for name in _CHECKPOINTS],
            quantizations=quantizations,
            size=(int(base_resolution), aspect_ratio),
            steps=steps,
            cfg=cfg,
            columns=columns,
            node_id=getattr(cls.hidden, "unique_id", None),
        )
        return io.NodeOutput(*drawn)


def _models() -> list[io.Input]:
    """A combo for each checkpoint: the page shows a list of several values in one of its renderers only."""
    combos: list[io.Input] = [
        io.Combo.Input(
            name,
            options=checkpoint_options(),
            default=NO_CHECKPOINT,
            optional=True,
            tooltip="One of LensModelLoader's list to compare, with its own steps and cfg.",
        )
        for name in _CHECKPOINTS
    ]
    return [
        *combos,
        io.String.Input(
            "quantizations",
            default=NONE,
            optional=True,
            tooltip=(
                "Each checkpoint is drawn in each of these of LensModelLoader's quantization, for example "
                "none, int8_dynamic, uint4_sdnq."
            ),
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
