"""A denoiser quantised once, into a file."""

from comfy_api.latest import io

from ..lens_core.quant.policy import MODES
from .host import paths
from .host.choice import check_choice
from .host.progress import say
from .host.quantize import fingerprint, quantize_model
from .host.settings import one_of


class LensQuantizeModel(io.ComfyNode):
    """Denoiser file or folder -> a smaller file in models/diffusion_models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensQuantizeModel",
            display_name="Lens Quantize Model",
            category="Lens/loaders",
            description=(
                "Writes a Lens denoiser with smaller weights to a file, which then loads without being "
                "quantised. Cancelled and run again, it goes on where it was. Run it alone, then press R."
            ),
            search_aliases=["microsoft lens", "quantize", "fp8", "int8", "int4", "nvfp4", "save model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=paths.choices("denoiser"),
                    tooltip="The denoiser in bf16 or fp32: a file or a Lens folder, as in LensModelLoader.",
                ),
                io.Combo.Input(
                    "quantization",
                    options=list(MODES),
                    default="float8_dynamic",
                    tooltip=(
                        "As in LensModelLoader. UNETLoader reads float8, int8, mxfp8 and nvfp4 too; "
                        "int4_weight_only and uint4_sdnq, in a format of this pack, LensModelLoader alone."
                    ),
                ),
                io.String.Input(
                    "file_name",
                    default="",
                    optional=True,
                    tooltip=(
                        "The file in models/diffusion_models, or a folder in there and the file. Empty: the "
                        "model's name and the mode."
                    ),
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Replace a file of that name. Off: a file that is something else is an error.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output(display_name="file_name", tooltip="As the loaders list the file.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, model_name=None):
        """Instead of ComfyUI's "not in list"."""
        return check_choice("denoiser", model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name="", quantization="", file_name="", **_):
        """A file that was deleted is written again; a linked value is None here."""
        return fingerprint(model_name or "", quantization or "", file_name or "")

    @classmethod
    def execute(
        cls, model_name: str, quantization: str, file_name: str = "", overwrite: bool = False
    ) -> io.NodeOutput:
        mode = one_of("quantization", quantization, MODES)
        option, text = quantize_model(model_name, mode, file_name, overwrite)
        say(text, getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(option)
