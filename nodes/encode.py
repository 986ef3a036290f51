"""Prompt to conditioning."""

from comfy_api.latest import io

from .host.conditioning import encode_pair


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
                "without any text, as Lens was trained. Prompt weights and wildcards are plain text."
            ),
            search_aliases=["microsoft lens", "prompt", "gpt-oss"],
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
                    tooltip="What to avoid. Blank is what Lens was published with; unused at cfg 1.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="What to draw."),
                io.Conditioning.Output(display_name="negative", tooltip="What to steer away from."),
            ],
        )

    @classmethod
    def execute(cls, clip, prompt: str, negative: str = "") -> io.NodeOutput:
        return io.NodeOutput(*encode_pair(clip, prompt, negative))
