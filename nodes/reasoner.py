"""A short request to a whole prompt, by the text encoder's own weights."""

from comfy_api.latest import io

from ..lens_core.reasoner import PRESETS
from ..lens_core.reasoner.local import EFFORTS, LocalOptions
from ..lens_core.reasoner.sampling import Sampling
from .host.reasoner import write_prompt
from .host.settings import one_of


class LensReasoner(io.ComfyNode):
    """CLIP and request -> prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensReasoner",
            display_name="Lens Reasoner",
            category="Lens/conditioning",
            description=(
                "Rewrites a short request into a whole prompt, with the GPT-OSS weights that the text "
                "encoder already holds. Text in quotation marks is kept letter for letter."
            ),
            search_aliases=[
                "microsoft lens",
                "gpt-oss",
                "prompt enhancer",
                "prompt upsampling",
                "llm",
                "rewrite prompt",
            ],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="From LensEncoderLoader; of ComfyUI's own file the last matrix is missing.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What to draw, in any language. Put text to be drawn in quotes.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="general",
                    tooltip=(
                        "What the prompt is for. poster: text first. short: 45 words at most. caption: a "
                        "LoRA's training caption from notes or tags."
                    ),
                ),
                *_writing(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output(display_name="prompt", tooltip="For LensTextEncode's prompt.")],
        )

    @classmethod
    def execute(
        cls,
        clip,
        prompt: str,
        preset: str,
        seed: int,
        temperature: float,
        max_new_tokens: int,
        effort: str,
    ) -> io.NodeOutput:
        options = LocalOptions(
            Sampling(temperature, seed=seed), max_new_tokens, one_of("effort", effort, EFFORTS)
        )
        node_id = getattr(cls.hidden, "unique_id", None)
        return io.NodeOutput(write_prompt(clip, prompt, one_of("preset", preset, PRESETS), options, node_id))


def _writing() -> list[io.Input]:
    """How it is written."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Another seed, another prompt; the same one gives the same on the same GPU.",
        ),
        io.Float.Input(
            "temperature",
            default=0.7,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How freely words are drawn. 0: always the likeliest, whatever the seed.",
        ),
        io.Int.Input(
            "max_new_tokens",
            default=4096,
            min=16,
            max=16384,
            advanced=True,
            tooltip="Where writing ends at the latest, reasoning included.",
        ),
        io.Combo.Input(
            "effort",
            options=list(EFFORTS),
            default="low",
            tooltip=(
                "How much it reasons before it writes. low: as published. none: not at all, fastest. "
                "medium and high: longer."
            ),
        ),
    ]
