"""Where each file of Lens is published: mirrors in order, folder and name in ComfyUI, size and SHA-256.

Pure data. ``microsoft/Lens*`` was withdrawn, so the table names what lives. How each fact was confirmed:

- Comfy-Org/Lens: paths and names by the links of ComfyUI's own Lens templates and the repository's card;
  gigabytes by its file list. SHA-256 of ``lens_turbo_bf16`` by HartsyInference's pinned catalogue alone, of
  ``gpt_oss_20b_nvfp4`` by that and by Civitai's mirror of it (103D7759C7). None was found for ``lens_bf16``
  and the mxfp8 files: there the checksum that the hub itself states is all.
- The VAE: size and SHA-256 by SceneWorks' provenance test, which found the same bytes in Comfy-Org/Lens,
  SceneWorks/Lens and black-forest-labs/FLUX.2-dev.
- openai/gpt-oss-20b: sizes and SHA-256 by several independent programs that pin revision 6cee5e8.
- SceneWorks/Lens{,-Turbo} (bf16), YuCollection/Lens{,-Turbo,-Base}-Diffusers (fp32, unmodified),
  rootonchair/Lens-GGUF, unsloth/gpt-oss-20b-GGUF: by their cards and file lists.
- WaveCut/Lens{,-Turbo}-SDNQ-uint4-static: by the card, and by programs that install them.
- Jinstudio/Lens{,-Turbo,-Base}: by name only, so they come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

HUB = "https://huggingface.co"
LENS_FOLDER = "lens"
_DENOISERS, _ENCODERS, _VAES = "diffusion_models", "text_encoders", "vae"


@dataclass(frozen=True)
class Published:
    """A file as published: bytes and SHA-256 in hex, None where that was not found."""

    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Mirror:
    """One place to take a component from, and where it goes below ComfyUI's models folder.

    ``paths`` are files of the repository, or whole folders where they end in a slash. A ``name`` with a
    suffix is a file: there is one path, stored under that name. Without, it is a folder that keeps the paths.
    """

    repository: str
    paths: tuple[str, ...]
    directory: str
    name: str
    gigabytes: float

    @property
    def is_folder(self) -> bool:
        return not PurePosixPath(self.name).suffix

    @property
    def url(self) -> str:
        """The file's address, or the repository's page for a folder."""
        if self.is_folder:
            return f"{HUB}/{self.repository}"
        return f"{HUB}/{self.repository}/resolve/main/{self.paths[0]}"

    @property
    def place(self) -> str:
        """Where it goes, below the models folder."""
        return f"{self.directory}/{self.name}"

    def local(self, path: str) -> str:
        """Where a file of the repository goes, below the models folder."""
        return f"{self.place}/{path}" if self.is_folder else self.place


@dataclass(frozen=True)
class Source:
    """One component (denoiser, encoder, vae, or a folder of all): what it is, and its mirrors in order."""

    component: str
    what: str
    mirrors: tuple[Mirror, ...]


# By place below the models folder.
PUBLISHED = {
    "diffusion_models/lens_turbo_bf16.safetensors": Published(
        sha256="a9fc0e27261d9199d4e46e573a6b247f3cd94beec0241e61ae9eaee5ae9ef7c9"
    ),
    "text_encoders/gpt_oss_20b_nvfp4.safetensors": Published(
        sha256="103d7759c720627e5ffdcb0d885595695085dad4201fa6a522a84d4b86335ca0"
    ),
    "vae/flux2-vae.safetensors": Published(
        336_213_556, "d64f3a68e1cc4f9f4e29b6e0da38a0204fe9a49f2d4053f0ec1fa1ca02f9c4b5"
    ),
    "text_encoders/gpt-oss-20b/model-00000-of-00002.safetensors": Published(
        4_792_272_488, "16d0f997dcfc4462089d536bffe51b4bcea2f872f5c430be09ef8ed392312427"
    ),
    "text_encoders/gpt-oss-20b/model-00001-of-00002.safetensors": Published(
        4_798_702_184, "4fbe328ab445455d6f58dc73852b85873bd626986310abd91cd4d2ce3245eaea"
    ),
    "text_encoders/gpt-oss-20b/model-00002-of-00002.safetensors": Published(
        4_170_342_232, "a18106b209e9ab35c3406db4f6f12a927364a058b21e9d1373d682e20674b303"
    ),
    "text_encoders/gpt-oss-20b/model.safetensors.index.json": Published(
        36_355, "0e085b977c4c9942f85938828e8c989ed7d5cdabf852e4da6a67c116cd502cd1"
    ),
    "text_encoders/gpt-oss-20b/tokenizer.json": Published(
        27_868_174, "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
    ),
    "text_encoders/gpt-oss-20b/config.json": Published(1_806),
}

_GPT_OSS_FILES = tuple(
    place.removeprefix("text_encoders/gpt-oss-20b/") for place in PUBLISHED if "/gpt-oss-20b/" in place
)


def _comfy(directory: str, name: str, gigabytes: float) -> Mirror:
    """A single file of ComfyUI's own repository, which has the folders of ComfyUI."""
    return Mirror("Comfy-Org/Lens", (f"{directory}/{name}",), directory, name, gigabytes)


def _folders(name: str, paths: tuple[str, ...], repositories: dict[str, float]) -> tuple[Mirror, ...]:
    """Parts of diffusers folders, which keep their layout below models/lens; gigabytes by repository."""
    return tuple(
        Mirror(repository, paths, LENS_FOLDER, name, size) for repository, size in repositories.items()
    )


_TRANSFORMER = ("transformer/",)
_OPENAI = Mirror("openai/gpt-oss-20b", _GPT_OSS_FILES, _ENCODERS, "gpt-oss-20b", 13.79)
# All that ``generate`` reads of a Lens folder.
_WHOLE = ("transformer/", "text_encoder/", "vae/", "tokenizer/")
_ENCODER_FOLDERS = _folders(
    "Lens-Turbo",
    ("text_encoder/", "tokenizer/"),
    {"SceneWorks/Lens-Turbo": 13.8, "YuCollection/Lens-Turbo-Diffusers": 13.8},
)

SOURCES = {
    "lens-turbo-denoiser": Source(
        "denoiser",
        "Lens-Turbo, 4 steps",
        (
            _comfy(_DENOISERS, "lens_turbo_bf16.safetensors", 8.21),
            *_folders(
                "Lens-Turbo",
                _TRANSFORMER,
                {
                    "SceneWorks/Lens-Turbo": 8.21,
                    "YuCollection/Lens-Turbo-Diffusers": 16.42,
                    "Jinstudio/Lens-Turbo": 16.42,
                },
            ),
        ),
    ),
    "lens-denoiser": Source(
        "denoiser",
        "Lens, 20 steps",
        (
            _comfy(_DENOISERS, "lens_bf16.safetensors", 8.21),
            *_folders(
                "Lens",
                _TRANSFORMER,
                {"SceneWorks/Lens": 8.21, "YuCollection/Lens-Diffusers": 16.42, "Jinstudio/Lens": 16.42},
            ),
        ),
    ),
    "lens-base-denoiser": Source(
        "denoiser",
        "Lens-Base, 50 steps",
        _folders(
            "Lens-Base",
            _TRANSFORMER,
            {"YuCollection/Lens-Base-Diffusers": 16.42, "Jinstudio/Lens-Base": 16.42},
        ),
    ),
    "lens-turbo-folder": Source(
        "folder",
        "Lens-Turbo whole, for the command line",
        _folders(
            "Lens-Turbo",
            _WHOLE,
            {
                "SceneWorks/Lens-Turbo": 22.4,
                "YuCollection/Lens-Turbo-Diffusers": 30.6,
                "Jinstudio/Lens-Turbo": 30.6,
            },
        ),
    ),
    "lens-folder": Source(
        "folder",
        "Lens whole, for the command line",
        _folders(
            "Lens",
            _WHOLE,
            {"SceneWorks/Lens": 22.4, "YuCollection/Lens-Diffusers": 30.6, "Jinstudio/Lens": 30.6},
        ),
    ),
    "lens-base-folder": Source(
        "folder",
        "Lens-Base whole, for the command line",
        _folders(
            "Lens-Base", _WHOLE, {"YuCollection/Lens-Base-Diffusers": 30.6, "Jinstudio/Lens-Base": 30.6}
        ),
    ),
    "lens-turbo-mxfp8": Source(
        "denoiser", "Lens-Turbo in mxfp8", (_comfy(_DENOISERS, "lens_turbo_mxfp8.safetensors", 5.5),)
    ),
    "lens-mxfp8": Source("denoiser", "Lens in mxfp8", (_comfy(_DENOISERS, "lens_mxfp8.safetensors", 5.5),)),
    "lens-turbo-uint4": Source(
        "denoiser",
        "Lens-Turbo in SDNQ's uint4",
        _folders("Lens-Turbo-SDNQ-uint4", _TRANSFORMER, {"WaveCut/Lens-Turbo-SDNQ-uint4-static": 4.3}),
    ),
    "lens-uint4": Source(
        "denoiser",
        "Lens in SDNQ's uint4",
        _folders("Lens-SDNQ-uint4", _TRANSFORMER, {"WaveCut/Lens-SDNQ-uint4-static": 4.3}),
    ),
    "lens-q8": Source(
        "denoiser",
        "Lens as a GGUF in Q8_0",
        (Mirror("rootonchair/Lens-GGUF", ("lens-q8_0.gguf",), _DENOISERS, "lens-q8_0.gguf", 4.4),),
    ),
    "encoder": Source(
        "encoder",
        "GPT-OSS-20B for ComfyUI, its tokenizer inside",
        (_comfy(_ENCODERS, "gpt_oss_20b_nvfp4.safetensors", 13.2), _OPENAI, *_ENCODER_FOLDERS),
    ),
    "encoder-mxfp4": Source("encoder", "GPT-OSS-20B as OpenAI published it", (_OPENAI, *_ENCODER_FOLDERS)),
    "encoder-gguf": Source(
        "encoder",
        "GPT-OSS-20B as a GGUF, lossless (needs pip install gguf)",
        (
            Mirror(
                "unsloth/gpt-oss-20b-GGUF",
                ("gpt-oss-20b-F16.gguf",),
                _ENCODERS,
                "gpt-oss-20b-F16.gguf",
                13.8,
            ),
        ),
    ),
    "vae": Source(
        "vae",
        "FLUX.2's VAE",
        (
            _comfy(_VAES, "flux2-vae.safetensors", 0.34),
            Mirror(
                "SceneWorks/Lens",
                ("vae/diffusion_pytorch_model.safetensors",),
                _VAES,
                "flux2-vae.safetensors",
                0.34,
            ),
        ),
    ),
}

# What a workflow needs, and single components under their own names.
BUNDLES = {
    "lens-turbo": ("lens-turbo-denoiser", "encoder", "vae"),
    "lens": ("lens-denoiser", "encoder", "vae"),
    "lens-base": ("lens-base-denoiser", "encoder", "vae"),
    **{name: (name,) for name in SOURCES},
}

# What a loader that has nothing to offer names first.
USUAL = {"denoiser": "lens-turbo-denoiser", "encoder": "encoder", "vae": "vae"}

# Encoders that can write text too; ComfyUI's own file was made without its last matrix.
_WITH_HEAD = ("encoder-mxfp4", "encoder-gguf")


def with_head() -> str:
    """The encoder files that the reasoner can use, and the commands that fetch them, in words."""
    found = {key: SOURCES[key].mirrors[0] for key in _WITH_HEAD}
    listed = [
        f"{mirror.name} of {mirror.repository} (python -m lens_core download {key})"
        for key, mirror in found.items()
    ]
    return f"{', '.join(listed)}, or a whole Lens folder's text_encoder"


def known(name: str) -> Published | None:
    """What is published of a file, by its name or path; None for a file that is not in the table.

    A shard is told from another model's by its folder: ``gpt-oss-20b/model-00000-of-00002.safetensors``.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    for place, published in PUBLISHED.items():
        wanted = PurePosixPath(place).parts[1:]
        if parts[-len(wanted) :] == wanted:
            return published
    return None


def published_as(component: str, name: str) -> str | None:
    """The key of the source that is called so in ComfyUI, by its first mirror; None for other names."""
    wanted = PurePosixPath(name.replace("\\", "/")).name
    for key, source in SOURCES.items():
        if source.component in (component, "folder") and source.mirrors[0].name == wanted:
            return key
    return None


def workflow_model(mirror: Mirror) -> dict[str, str]:
    """A single file as ComfyUI's page wants it in a workflow's ``properties.models``, to offer its link."""
    entry = {"name": mirror.name, "url": mirror.url}
    published = PUBLISHED.get(mirror.place)
    if published and published.sha256:
        entry |= {"hash": published.sha256, "hash_type": "SHA256"}
    return entry | {"directory": mirror.directory}
