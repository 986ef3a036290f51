"""A short prompt to a full one, by a language model on a server."""

from comfy_api.latest import io

from ..lens_core.reasoner import PRESETS
from ..lens_core.reasoner.remote import EFFORTS, Generation
from .host.reasoner_api import ERROR, ON_FAILURE, failures, rewrite_by_api


class LensReasonerAPI(io.ComfyNode):
    """Prompt -> prompt, through any server that speaks OpenAI's API."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensReasonerAPI",
            display_name="Lens Reasoner (API)",
            category="Lens/conditioning",
            description=(
                "Rewrites a short prompt into a full description, by a language model on a server that "
                "speaks OpenAI's API: OpenAI's, or llama.cpp, vLLM, Ollama, LM Studio on this machine. The "
                "key comes from the environment (OPENAI_API_KEY), never from the workflow. Needs pip install "
                "openai."
            ),
            search_aliases=[
                "microsoft lens",
                "prompt enhancer",
                "prompt rewriter",
                "llm",
                "openai",
                "chatgpt",
            ],
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What to draw. Text in quotes is kept letter for letter.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="general",
                    tooltip="What kind of prompt to write; caption: for LoRA training, from notes or tags.",
                ),
                io.String.Input("model", default="gpt-5.5", tooltip="The model's name on the server."),
                io.String.Input(
                    "api_url",
                    default="",
                    tooltip=(
                        "The server's address, such as http://127.0.0.1:8080/v1. Blank: the environment's "
                        "OPENAI_BASE_URL, or else OpenAI. The key goes to that server alone."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Another seed asks again. The same one need not give the same answer.",
                ),
                *_generation(),
                *_waiting(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output(display_name="prompt", tooltip="For LensTextEncode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, api_url="", **_):
        """After a failure the same inputs are asked again; a linked value is None here."""
        return failures(api_url)

    @classmethod
    def execute(
        cls,
        prompt,
        preset,
        model,
        api_url,
        seed,
        temperature,
        max_new_tokens,
        effort,
        timeout,
        on_failure,
    ) -> io.NodeOutput:
        generation = Generation(seed, temperature, max_new_tokens, effort)
        node_id = getattr(cls.hidden, "unique_id", None)
        waiting = {"timeout": timeout, "on_failure": on_failure, "node_id": node_id}
        return io.NodeOutput(rewrite_by_api(prompt, preset, api_url, model, generation, **waiting))


def _generation() -> list[io.Input]:
    usual = Generation()
    return [
        io.Float.Input(
            "temperature",
            default=usual.temperature,
            min=0.0,
            max=2.0,
            step=0.05,
            round=0.01,
            advanced=True,
            tooltip="0: the likeliest words; higher: more varied answers.",
        ),
        io.Int.Input(
            "max_new_tokens",
            default=usual.max_new_tokens,
            min=16,
            max=32768,
            advanced=True,
            tooltip="Most tokens of an answer, the model's thoughts included.",
        ),
        io.Combo.Input(
            "effort",
            options=list(EFFORTS),
            default=usual.effort,
            advanced=True,
            tooltip="How much the model thinks first, where it can; default: as the server sets it.",
        ),
    ]


def _waiting() -> list[io.Input]:
    """How long to wait, and what then."""
    return [
        io.Float.Input(
            "timeout",
            default=60.0,
            min=1.0,
            max=3600.0,
            step=1.0,
            advanced=True,
            tooltip="Seconds to wait for an answer.",
        ),
        io.Combo.Input(
            "on_failure",
            options=list(ON_FAILURE),
            default=ERROR,
            tooltip="Without an answer: stop with an error, or draw the original prompt.",
        ),
    ]
