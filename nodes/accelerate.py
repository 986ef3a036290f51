"""Optional speed: CUDA graphs and the attention of a MODEL."""

from comfy_api.latest import io

from .host.accelerate import accelerate
from .host.attention import ATTENTIONS


class LensAccelerate(io.ComfyNode):
    """MODEL -> MODEL that draws the same pictures in less time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensAccelerate",
            display_name="Lens Accelerate",
            category="Lens/sampling",
            description=(
                "Optional speed for NVIDIA GPUs that hold the whole model. Elsewhere the workflow runs as "
                "without this node."
            ),
            search_aliases=["microsoft lens", "cuda graphs", "flash attention", "speed", "faster"],
            inputs=[
                io.Model.Input("model", tooltip="From LensModelLoader, best directly; LoRA after this node."),
                io.Boolean.Input(
                    "cuda_graphs",
                    default=True,
                    tooltip=(
                        "Record the steps' launches once for each size and play them: the same picture "
                        "without waiting for the CPU. The model then leaves dynamic VRAM."
                    ),
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    default="auto",
                    tooltip=(
                        "auto: Lens' own choice, or the one ComfyUI was started with. host: ComfyUI's. "
                        "flash_attn3: FlashAttention-3, which must be installed. Graphs need auto."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For LensSampler or any sampler.")],
        )

    @classmethod
    def execute(cls, model, cuda_graphs, attention) -> io.NodeOutput:
        return io.NodeOutput(accelerate(model, cuda_graphs, attention))
