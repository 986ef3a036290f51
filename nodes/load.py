"""Loaders: a file or a Lens folder to MODEL, CLIP or VAE."""

from comfy_api.latest import io

from ..lens_core.config import PLACEMENTS
from ..lens_core.loading import DTYPES
from ..lens_core.quant.policy import CHOICES, NONE
from .host import paths
from .host.choice import check_choice
from .host.clip import load_clip
from .host.draft_vae import DRAFT, draft_choices, load_draft_vae
from .host.progress import say, size_in_words, telling
from .host.settings import one_of
from .host.shelf import hold, shelved_model
from .host.vae import load_host_vae

_CATEGORY = "Lens/loaders"
_EXPERTS = ("packed", "bfloat16")
_DTYPES = {"auto": None, **DTYPES}


class LensModelLoader(io.ComfyNode):
    """Denoiser file or folder -> MODEL and the variant's published settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensModelLoader",
            display_name="Lens Model Loader",
            category=_CATEGORY,
            description=(
                "Loads a Lens denoiser. Steps and cfg are the settings that the checkpoint was "
                "published with: connect them, and swapping Turbo, RL and Base swaps them too."
            ),
            search_aliases=["microsoft lens", "text to image", "load lens", "lens turbo"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=paths.choices("denoiser"),
                    tooltip=(
                        "A file in models/diffusion_models (lens_bf16, lens_turbo_bf16) or checkpoints, or "
                        "a Lens folder in models/lens or diffusers. The name tells Turbo and Base from Lens."
                    ),
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(_DTYPES),
                    default="auto",
                    tooltip=(
                        "How the weights are held. auto: bfloat16 where the GPU has it, else "
                        "float32. float16 is not offered: Lens overflows in it."
                    ),
                ),
                io.Combo.Input(
                    "quantization",
                    options=list(CHOICES),
                    default=NONE,
                    optional=True,
                    tooltip=(
                        "Makes the weights smaller as they load. auto: by the GPU's memory and generation; "
                        "the log says what and why. *_dynamic (W8A8) is the fastest, 4 bits the smallest. "
                        "none: as the file is. Modulation, norms, projections in and out stay as they are."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For LensSampler or any sampler."),
                io.Int.Output(display_name="steps", tooltip="20 for Lens, 4 for Turbo, 50 for Base."),
                io.Float.Output(display_name="cfg", tooltip="5 for Lens and Base, 1 for Turbo."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name=None):
        """Instead of ComfyUI's "not in list"."""
        return check_choice("denoiser", model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name="", dtype="auto", quantization=NONE, **_):
        """A file replaced under its name is opened again. ComfyUI asks before it forgets earlier outputs."""
        hold(model_name, _DTYPES.get(dtype), quantization)
        return paths.stamp("denoiser", model_name)

    @classmethod
    def execute(cls, model_name: str, dtype: str, quantization: str = NONE) -> io.NodeOutput:
        held = _DTYPES[one_of("dtype", dtype, _DTYPES)]
        mode = one_of("quantization", quantization, CHOICES)
        node_id = getattr(cls.hidden, "unique_id", None)
        with telling(node_id):
            model, variant = shelved_model(model_name, held, mode)
        size = size_in_words(model.model_size())
        say(f"{variant.name}: {variant.steps} steps, cfg {variant.cfg:g}. {size}", node_id)
        return io.NodeOutput(model, variant.steps, variant.cfg)


class LensEncoderLoader(io.ComfyNode):
    """GPT-OSS encoder file or folder -> CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensEncoderLoader",
            display_name="Lens Encoder Loader",
            category=_CATEGORY,
            description=(
                "Loads GPT-OSS-20B as Lens' text encoder. Its experts stay packed in 4 bits, and it is read "
                "only when a prompt needs it."
            ),
            search_aliases=["microsoft lens", "gpt-oss", "lens text encoder", "lens clip", "gguf"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=paths.choices("encoder"),
                    tooltip=(
                        "GPT-OSS-20B: a folder of shards or a file (MXFP4, nvfp4, GGUF, bf16) in "
                        "models/text_encoders, or a Lens folder in models/lens or diffusers."
                    ),
                ),
                io.Combo.Input(
                    "placement",
                    options=list(PLACEMENTS),
                    default="auto",
                    optional=True,
                    tooltip=(
                        "auto: as many layers on the GPU as fit, the others streamed while encoding. gpu: "
                        "all, 11.5 GB. stream: none, 1.1 GB while encoding. cpu: no GPU, half a minute."
                    ),
                ),
                io.Combo.Input(
                    "experts",
                    options=list(_EXPERTS),
                    default="packed",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "packed: 4 bits as stored, fastest. bfloat16: unpacked once on the GPU, 39.6 GB, as "
                        "the published program does without its kernels."
                    ),
                ),
                io.Boolean.Input(
                    "feature_cache",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Keep each prompt's features on disk (user/__lens, 1 GB unless the settings say "
                        "otherwise): a prompt seen before then needs no encoder, even after a restart."
                    ),
                ),
            ],
            outputs=[io.Clip.Output(display_name="CLIP", tooltip="For LensTextEncode or CLIPTextEncode.")],
        )

    @classmethod
    def validate_inputs(cls, encoder_name=None):
        """Instead of ComfyUI's "not in list"."""
        return check_choice("encoder", encoder_name)

    @classmethod
    def fingerprint_inputs(cls, encoder_name="", **_):
        """A file replaced under its name is opened again."""
        return paths.stamp("encoder", encoder_name)

    @classmethod
    def execute(
        cls,
        encoder_name: str,
        placement: str = "auto",
        experts: str = "packed",
        feature_cache: bool = True,
    ) -> io.NodeOutput:
        path = paths.path_of("encoder", encoder_name)
        dense = one_of("experts", experts, _EXPERTS) == "bfloat16"
        return io.NodeOutput(load_clip(path, placement=placement, dense=dense, remember=feature_cache))


class LensVAELoader(io.ComfyNode):
    """FLUX.2 VAE file or folder -> VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensVAELoader",
            display_name="Lens VAE Loader",
            category=_CATEGORY,
            description="Loads FLUX.2's VAE, which Lens draws with.",
            search_aliases=["microsoft lens", "flux2 vae", "lens vae"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=[*paths.choices("vae"), *draft_choices()],
                    tooltip=(
                        "flux2-vae in models/vae, or a Lens folder in models/lens or diffusers. taef2, where "
                        "models/vae_approx has it, is tiny: quick drafts, not Lens' own pictures."
                    ),
                )
            ],
            outputs=[io.Vae.Output(display_name="VAE", tooltip="For LensVAEDecode or any VAE node.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name=None):
        """Instead of ComfyUI's "not in list"."""
        return vae_name == DRAFT or check_choice("vae", vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        if vae_name == DRAFT:
            return io.NodeOutput(load_draft_vae())
        return io.NodeOutput(load_host_vae(paths.path_of("vae", vae_name)))
