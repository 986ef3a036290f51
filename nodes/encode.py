"""Prompt to conditioning."""

from comfy_api.latest import io

from .host.conditioning import DATES, ONE, SEVERAL, date_of, encode_pair
from .host.feature_cache import clear_features
from .host.progress import say


class LensTextEncode(io.ComfyNode):
    """Prompt and negative prompt -> two CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensTextEncode",
            display_name="Lens Text Encode",
            category="Lens/conditioning",
            description=(
                "Encodes a prompt and a negative prompt. A blank negative costs nothing: it is drawn "
                "without any text, as Lens was trained. Several prompts make a batch of pictures. Prompt "
                "weights and wildcards are plain text."
            ),
            search_aliases=["microsoft lens", "prompt", "gpt-oss", "text to image"],
            inputs=[
                io.Clip.Input("clip", tooltip="From LensEncoderLoader, or CLIPLoader with type 'lens'."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="Whole sentences work best, up to 393 tokens. Put text to be drawn in quotes.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What to avoid (at cfg 1 by nag_scale). Blank is what Lens was published with.",
                ),
                *_options(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="What to draw."),
                io.Conditioning.Output(display_name="negative", tooltip="What to steer away from."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, template_date="pinned", **_):
        """With today's date the features change at midnight; a linked value (None here) may say today."""
        return date_of(template_date or "today")

    @classmethod
    def execute(
        cls,
        clip,
        prompt: str,
        negative: str = "",
        extended: bool = False,
        template_date: str = "pinned",
        several: str = ONE,
    ) -> io.NodeOutput:
        date, node_id = date_of(template_date), getattr(cls.hidden, "unique_id", None)
        options = {"several": several, "extended": extended, "date": date, "node_id": node_id}
        pair = encode_pair(clip, prompt, negative, **options)
        return io.NodeOutput(*pair)


class LensClearFeatureCache(io.ComfyNode):
    """Deletes the text features kept on disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensClearFeatureCache",
            display_name="Lens Clear Feature Cache",
            category="Lens/conditioning",
            description=(
                "Deletes the text features that LensTextEncode keeps on disk. They are never stale, so this "
                "only frees their space. Run it alone."
            ),
            search_aliases=["microsoft lens", "cache", "clear"],
            inputs=[],
            hidden=[io.Hidden.unique_id],
            outputs=[],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls):
        """Never the same: ComfyUI would skip it the second time, for it has no inputs that change."""
        return float("nan")

    @classmethod
    def execute(cls) -> io.NodeOutput:
        say(clear_features(), getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput()


def _options() -> list[io.Input]:
    """What few prompts need."""
    return [
        io.Boolean.Input(
            "extended",
            default=False,
            optional=True,
            advanced=True,
            tooltip=(
                "Let prompts above 393 tokens through instead of cutting them at a word. Lens was "
                "not trained with them."
            ),
        ),
        io.Combo.Input(
            "template_date",
            options=list(DATES),
            default="pinned",
            optional=True,
            advanced=True,
            tooltip=(
                "The date in the chat text around the prompt. pinned: always the same, so a prompt "
                "always means the same. today: as the published program, which changes daily."
            ),
        ),
        io.Combo.Input(
            "several",
            options=list(SEVERAL),
            default=ONE,
            optional=True,
            advanced=True,
            tooltip=(
                "Draw each line, or each part between |, as a prompt of its own, one picture each: "
                "set the latent's batch_size to their number."
            ),
        ),
    ]
