"""Step skipping on a MODEL."""

from comfy_api.latest import io

from ..lens_core.denoiser import DEFAULT_THRESHOLD
from .host.step_cache import with_step_cache


def _share(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True, tooltip=tooltip
    )


class LensStepCache(io.ComfyNode):
    """MODEL -> MODEL that leaves out most of a step where little changes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensStepCache",
            display_name="Lens Step Cache",
            category="Lens/sampling",
            description=(
                "Faster, not the same picture: runs the first of the 48 blocks in every step and, where it "
                "adds what it added before, repeats what the other 47 added instead of running them."
            ),
            search_aliases=["microsoft lens", "teacache", "first block cache", "fbcache", "speed"],
            inputs=[
                io.Model.Input("model", tooltip="From LensModelLoader, with or without LoRA."),
                io.Float.Input(
                    "threshold",
                    default=DEFAULT_THRESHOLD,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    round=0.001,
                    tooltip=(
                        "How much the first block's part may change, relative to the last step computed in "
                        "full. More skips more and strays further; 0 is off."
                    ),
                ),
                _share(
                    "start",
                    0.1,
                    "Nothing is skipped before this share of the steps (step i of n is at i / n).",
                ),
                _share(
                    "end", 1.0, "Nothing is skipped from this share of the steps on; the last step never is."
                ),
                io.Int.Input(
                    "max_consecutive",
                    default=3,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="After so many skipped steps in a row, one is computed in full.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For LensSampler or any sampler.")],
        )

    @classmethod
    def execute(cls, model, threshold, start, end, max_consecutive) -> io.NodeOutput:
        return io.NodeOutput(with_step_cache(model, threshold, start, end, max_consecutive))
