"""The pack's nodes: the one list of them."""

from comfy_api.latest import ComfyExtension, io

from .accelerate import LensAccelerate
from .decode import LensVAEDecode
from .doctor import LensDoctor
from .encode import LensClearFeatureCache, LensTextEncode
from .grid import LensGrid
from .host.paths import register_folders
from .latent import LensEmptyLatent, LensImageToLatent
from .load import LensEncoderLoader, LensModelLoader, LensVAELoader
from .lora import LensLoraLoader
from .memory import LensMemoryEstimate
from .quantize import LensQuantizeModel
from .reasoner import LensReasoner
from .reasoner_api import LensReasonerAPI
from .sample import LensGuider, LensNoise, LensSampler, LensScheduler
from .save import LensSaveModel
from .step_cache import LensStepCache


class LensExtension(ComfyExtension):
    """Registers the nodes and the models/lens folder."""

    async def on_load(self) -> None:
        """Once, before the nodes are listed."""
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return [
            LensModelLoader,
            LensQuantizeModel,
            LensLoraLoader,
            LensSaveModel,
            LensAccelerate,
            LensEncoderLoader,
            LensVAELoader,
            LensMemoryEstimate,
            LensDoctor,
            LensReasoner,
            LensReasonerAPI,
            LensTextEncode,
            LensClearFeatureCache,
            LensEmptyLatent,
            LensImageToLatent,
            LensSampler,
            LensScheduler,
            LensGuider,
            LensNoise,
            LensStepCache,
            LensGrid,
            LensVAEDecode,
        ]
