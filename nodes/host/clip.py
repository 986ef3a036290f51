"""The GPT-OSS encoder as a ComfyUI CLIP: tokenizer and model with the methods that CLIP calls.

The conditioning has the shape of ComfyUI's own Lens encoder, [1, S, L * H], so either can feed
either model. One prompt needs no padding, so there is no attention mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import comfy.hooks
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor, nn

from ...lens_core.config import CAPTURED_LAYERS, PLACEMENTS, TEMPLATE_DATE
from ...lens_core.encoder import no_features
from ...lens_core.errors import SettingError
from ...lens_core.loading import open_encoder
from ...lens_core.memory.estimate import encoder_bytes
from ...lens_core.prompt import PromptTokenizer
from ...lens_core.text_encoder import TextEncoder
from .feature_cache import feature_cache
from .patcher import EncoderPatcher
from .paths import tokenizer_places
from .progress import on_progress
from .recovery import CLOSE_OTHERS, with_recovery
from .settings import one_of

T = TypeVar("T")
KEY = "gpt_oss"
# What room is made for at least: the longest prompt that Lens was trained with, in its template.
_TOKENS = 1024


class HostTokenizer:
    """Text to tokens in the form that CLIP nodes pass on: {"gpt_oss": [[(id, weight), ...]]}."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self.tokenizer = tokenizer
        # The node's report and CLIP ask for the same; a cut prompt is warned of once.
        self.tokens = lru_cache(maxsize=4)(tokenizer)

    def tokenize_with_weights(
        self,
        text: str,
        return_word_ids: bool = False,
        keep_empty: bool = False,
        extended: bool = False,
        date: str = TEMPLATE_DATE,
        **_: Any,
    ) -> dict[str, list]:
        """Blank text has no tokens (the empty negative), unless ``keep_empty`` asks for an empty
        user turn (the empty positive). Prompt weights in the text are not interpreted."""
        if not text.strip() and not keep_empty:
            return {KEY: [[]]}
        return {KEY: [[(token, 1.0) for token in self.tokens(text, extended=extended, date=date).ids]]}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """What a saved text encoder file needs of the tokenizer."""
        text = self.tokenizer.tokenizer.to_str().encode()
        return {"tokenizer_json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


class LensClipModel(nn.Module):
    """The module inside CLIP. Its tensors are the master copies in RAM; ``text`` places them."""

    def __init__(self, text: TextEncoder, placement: str) -> None:
        super().__init__()
        self.transformer = text.model
        self.text, self.placement = text, placement
        self.on_cpu = False  # loaded, and the load device is the CPU
        self.dtypes = {text.dtype}
        self.execution_device: torch.device | None = None
        self._found: dict[tuple[int, ...], Tensor] = {}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """CLIP tells the device; a chosen layer ("clip skip") has no meaning here."""
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        """Forget the device of the last run, and features that it found."""
        self.execution_device = None
        self._found = {}

    def memory_estimation_function(self, tokens: Any, device: torch.device | None = None) -> int:
        """Bytes that encoding takes beside the resident layers."""
        return self.text.layers.buffers + encoder_bytes(max(_TOKENS, len(_ids(tokens)) if tokens else 0))

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Meanwhile every layer is streamed, unless they are dequantised, which only resident ones can be."""
        before = self.placement
        if not self.text.dense:
            self.placement = "stream"
        try:
            yield
        finally:
            self.placement = before

    def remembers(self, tokens: dict[str, list]) -> bool:
        """Whether these tokens need no encoder: none at all, or features kept on disk (taken now)."""
        ids = _ids(tokens)
        found = self.text.known(ids) if ids else None
        self._found = {} if found is None else {ids: found}
        return not ids or found is not None

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None, dict[str, Any]]:
        """Features [1, S, L * H] of one prompt's tokens, on the device for intermediate results."""
        ids = _ids(tokens)
        features = self._found.get(ids)  # asked for more than once where hooks make a schedule
        if not ids:
            features = no_features(self.transformer, len(CAPTURED_LAYERS), self.text.dtype)
        elif features is None:
            device = self.execution_device or torch.device("cpu")
            (features,) = self.text.encode([ids], device, on_progress(_encoding))
        result = features.flatten(2).to(comfy.model_management.intermediate_device())
        return result, None, {"num_layers_stacked": len(CAPTURED_LAYERS)}


def _encoding(done: int, total: int) -> str:
    return f"Encoding: layer {done}/{total}"


def _ids(tokens: dict[str, list]) -> tuple[int, ...]:
    return tuple(int(pair[0]) for pair in tokens[KEY][0])


class LensClip(comfy.sd.CLIP):
    """A CLIP that loads its model only for prompts whose features it does not remember."""

    def __init__(self, patcher: EncoderPatcher, tokenizer: HostTokenizer) -> None:
        """The attributes that CLIP's own constructor sets, without the patcher that it would make."""
        super().__init__(no_init=True)
        self.patcher, self.tokenizer = patcher, tokenizer
        self.layer_idx = self.apply_hooks_to_conds = None
        self.tokenizer_options: dict[str, Any] = {}
        self.use_clip_schedule = False

    @property
    def cond_stage_model(self) -> LensClipModel:
        """The patcher's module: for another GPU, ComfyUI exchanges the patcher alone."""
        return self.patcher.model

    def encode_from_tokens_scheduled(self, *args: Any, **kwargs: Any) -> Any:
        """As CLIP's; once more, streamed, where memory runs out."""
        encode = super().encode_from_tokens_scheduled
        return self._recovering(lambda: encode(*args, **kwargs))

    def encode_from_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As CLIP's; once more, streamed, where memory runs out."""
        encode = super().encode_from_tokens
        return self._recovering(lambda: encode(*args, **kwargs))

    def generating(self, run: Callable[[], T], working: int | None) -> T:
        """``run``, which writes text with the layers, on the load device and with room for ``working`` bytes
        beside them (None: it needs no layers); once more, streamed, where memory runs out."""
        management, device = comfy.model_management, self.patcher.load_device

        def attempt() -> T:
            if working is not None:
                needed = self.cond_stage_model.text.layers.buffers + working
                management.load_models_gpu([self.patcher], memory_required=needed)
            with management.cuda_device_context(device):
                return run()

        return self._recovering(attempt, "while writing the prompt", working)

    def _recovering(
        self, run: Callable[[], T], what: str = "while encoding the prompt", working: int | None = None
    ) -> T:
        model, device = self.cond_stage_model, self.patcher.load_device

        def streamed() -> T:
            with model.streaming():
                return run()

        def needed() -> float:
            resident = model.text.total if model.text.dense else 0
            if working is not None:
                return resident + model.text.layers.buffers + working
            return resident + model.memory_estimation_function(None)

        if model.text.dense:
            advice = ["LensEncoderLoader's experts 'packed', with placement 'stream'"]
        else:
            advice = ["LensEncoderLoader's placement 'cpu'", "a shorter prompt"]
        return with_recovery(
            run,
            streamed,
            what=what,
            device=device,
            advice=lambda: [*advice, CLOSE_OTHERS],
            needed=needed,
        )

    def load_model(self, tokens: dict[str, list] | None = None) -> EncoderPatcher:
        """As CLIP's; without tokens the model is loaded in any case (to be saved, for example)."""
        if tokens and self.cond_stage_model.remembers(tokens):
            return self.patcher
        return super().load_model(tokens or {})

    def state_dict_for_saving(self) -> dict[str, Tensor]:
        """As CLIP's, for CLIPSave: Hugging Face's MXFP4, which LensEncoderLoader reads."""
        file = self.cond_stage_model.text.file
        if file.config.expert_format != "mxfp4":
            raise SettingError(
                f"{file.name} holds its experts as {file.config.expert_format}, which cannot be saved again. "
                f"Nothing has changed it: copy {file.path} instead."
            )
        return super().state_dict_for_saving()

    def clone(self, disable_dynamic: bool = False) -> LensClip:
        """A CLIP of this class over the same model: ComfyUI's own clone makes a plain one."""
        copy = LensClip(self.patcher, self.tokenizer)
        copy.__dict__.update(super().clone(disable_dynamic).__dict__)
        return copy


def load_clip(path: Path, *, placement: str = "auto", dense: bool = False, remember: bool = True) -> LensClip:
    """An encoder file or folder as a CLIP; only its header is read until a prompt needs it.

    ``placement`` is one of ``config.PLACEMENTS``; ``dense`` dequantises the experts; ``remember`` keeps
    features on disk. Raises SettingError where dense experts have no GPU to be on.
    """
    management = comfy.model_management
    device = _device(placement)
    if dense and (placement == "stream" or device == torch.device("cpu")):
        raise SettingError(
            f"The encoder's experts in bfloat16 need all its layers on a GPU, which the placement "
            f"{placement!r} (here: {device}) does not give them. Set LensEncoderLoader's experts to 'packed'."
        )
    # Weights stay in bf16 and 4 bits; where bf16 arithmetic is slow or absent they are cast in use.
    compute = torch.bfloat16 if management.should_use_bf16(device) else torch.float32
    file = open_encoder(path, tokenizer_places())
    tokenizer = HostTokenizer(file.tokenizer)
    text = TextEncoder(file, compute, dense=dense, features=feature_cache() if remember else None)
    model = LensClipModel(text, placement)
    patcher = EncoderPatcher(model, device, management.text_encoder_offload_device())
    patcher.is_clip, patcher.hook_mode = True, comfy.hooks.EnumHookMode.MinVram
    patcher.cached_patcher_init = (_load_patcher, (path, placement, dense, remember))
    return LensClip(patcher, tokenizer)


def _device(placement: str) -> torch.device:
    """Where the encoder computes. With CUDA always there, unless the user asks for the CPU: streamed, it
    takes 1.1 GB, where ComfyUI's own choice under --lowvram is the CPU, a hundred times slower."""
    management = comfy.model_management
    if one_of("placement", placement, PLACEMENTS) == "cpu":
        return torch.device("cpu")
    device = management.get_torch_device()
    return device if placement != "auto" or device.type == "cuda" else management.text_encoder_device()


def _load_patcher(
    path: Path, placement: str, dense: bool, remember: bool, disable_dynamic: bool = False
) -> EncoderPatcher:
    return load_clip(path, placement=placement, dense=dense, remember=remember).patcher
