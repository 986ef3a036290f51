"""What a node promises to workflows and to its user: names, texts, options, help page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lens_core.quant.policy import MODES
from lens_core.sampling import ASPECT_RATIOS, BASE_RESOLUTIONS, bucket
from scripts.workflow import to_prompt

PACK = Path(__file__).parents[2]

# Node id -> (display name, inputs, outputs as (name, type)). Shared workflows hold ids, input names
# and output positions: a change here breaks them.
NODES = {
    "LensModelLoader": (
        "Lens Model Loader",
        ["model_name", "dtype", "quantization"],
        [("MODEL", "MODEL"), ("steps", "INT"), ("cfg", "FLOAT")],
    ),
    "LensQuantizeModel": (
        "Lens Quantize Model",
        ["model_name", "quantization", "file_name", "overwrite"],
        [("file_name", "STRING")],
    ),
    "LensLoraLoader": (
        "Lens LoRA Loader",
        ["model", "lora_name", "strength", "block_strengths"],
        [("MODEL", "MODEL")],
    ),
    "LensSaveModel": (
        "Lens Save Model",
        ["model", "file_name", "overwrite"],
        [("file_name", "STRING")],
    ),
    "LensAccelerate": (
        "Lens Accelerate",
        ["model", "cuda_graphs", "attention"],
        [("MODEL", "MODEL")],
    ),
    "LensEncoderLoader": (
        "Lens Encoder Loader",
        ["encoder_name", "placement", "experts", "feature_cache"],
        [("CLIP", "CLIP")],
    ),
    "LensVAELoader": ("Lens VAE Loader", ["vae_name"], [("VAE", "VAE")]),
    "LensMemoryEstimate": (
        "Lens Memory Estimate",
        ["model", "clip", "vae", "latent", "steps", "text_tokens", "vram_gb"],
        [("estimate", "STRING")],
    ),
    "LensDoctor": (
        "Lens Doctor",
        ["files", "hash", "parity", "model", "clip", "vae"],
        [("report", "STRING")],
    ),
    "LensReasoner": (
        "Lens Reasoner",
        ["clip", "prompt", "preset", "seed", "temperature", "max_new_tokens", "effort"],
        [("prompt", "STRING")],
    ),
    "LensTextEncode": (
        "Lens Text Encode",
        ["clip", "prompt", "negative", "extended", "template_date", "several"],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
    ),
    "LensReasonerAPI": (
        "Lens Reasoner (API)",
        [
            *("prompt", "preset", "model", "api_url", "seed"),
            *("temperature", "max_new_tokens", "effort", "timeout", "on_failure"),
        ],
        [("prompt", "STRING")],
    ),
    "LensClearFeatureCache": ("Lens Clear Feature Cache", [], []),
    "LensEmptyLatent": (
        "Lens Empty Latent",
        ["base_resolution", "aspect_ratio", "batch_size"],
        [("LATENT", "LATENT"), ("width", "INT"), ("height", "INT")],
    ),
    "LensImageToLatent": (
        "Lens Image To Latent",
        ["image", "vae", "base_resolution", "fit", "mask"],
        [("LATENT", "LATENT"), ("image", "IMAGE"), ("mask", "MASK")],
    ),
    "LensSampler": (
        "Lens Sampler",
        [
            *("model", "positive", "negative", "latent", "seed", "steps", "cfg", "noise", "denoise"),
            *("guidance_start", "guidance_end", "denoise_by", "custom_noise"),
            *("nag_scale", "nag_tau", "nag_alpha"),
        ],
        [("LATENT", "LATENT")],
    ),
    "LensScheduler": (
        "Lens Scheduler",
        ["steps", "latent", "denoise", "denoise_by"],
        [("SIGMAS", "SIGMAS")],
    ),
    "LensGuider": (
        "Lens Guider",
        [
            *("model", "positive", "negative", "cfg", "guidance_start", "guidance_end"),
            *("nag_scale", "nag_tau", "nag_alpha"),
        ],
        [("GUIDER", "GUIDER")],
    ),
    "LensNoise": (
        "Lens Noise",
        ["seed", "variation_seed", "variation_strength", "batch", "noise"],
        [("NOISE", "NOISE")],
    ),
    "LensStepCache": (
        "Lens Step Cache",
        ["model", "threshold", "start", "end", "max_consecutive"],
        [("MODEL", "MODEL")],
    ),
    "LensGrid": (
        "Lens Grid",
        [
            *("clip", "vae", "prompts", "negative", "seeds", "base_resolution", "aspect_ratio", "model"),
            *("checkpoint_1", "checkpoint_2", "checkpoint_3", "checkpoint_4", "quantizations"),
            *("steps", "cfg", "columns"),
        ],
        [("sheet", "IMAGE"), ("images", "IMAGE"), ("labels", "STRING")],
    ),
    "LensVAEDecode": ("Lens VAE Decode", ["latent", "vae"], [("IMAGE", "IMAGE")]),
}
# Values that a workflow stores, by node and input: (type, default).
SETTINGS = {
    ("LensModelLoader", "dtype"): (["auto", "bfloat16", "float32"], "auto"),
    ("LensModelLoader", "quantization"): (["none", "auto", *MODES], "none"),
    ("LensQuantizeModel", "quantization"): (list(MODES), "float8_dynamic"),
    ("LensQuantizeModel", "file_name"): ("STRING", ""),
    ("LensQuantizeModel", "overwrite"): ("BOOLEAN", False),
    ("LensLoraLoader", "strength"): ("FLOAT", 1.0),
    ("LensLoraLoader", "block_strengths"): ("STRING", ""),
    ("LensSaveModel", "file_name"): ("STRING", "lens_merged"),
    ("LensSaveModel", "overwrite"): ("BOOLEAN", False),
    ("LensAccelerate", "cuda_graphs"): ("BOOLEAN", True),
    ("LensAccelerate", "attention"): (["auto", "host", "flash_attn3"], "auto"),
    ("LensEmptyLatent", "base_resolution"): (["256", "512", "768", "1024", "1440"], "1024"),
    ("LensEmptyLatent", "aspect_ratio"): (list(ASPECT_RATIOS), "1:1"),
    ("LensEmptyLatent", "batch_size"): ("INT", 1),
    ("LensSampler", "seed"): ("INT", 0),
    ("LensSampler", "steps"): ("INT", 20),
    ("LensSampler", "cfg"): ("FLOAT", 5.0),
    ("LensSampler", "noise"): (["host", "reference"], "host"),
    ("LensSampler", "denoise"): ("FLOAT", 1.0),
    ("LensScheduler", "steps"): ("INT", 20),
    ("LensScheduler", "denoise"): ("FLOAT", 1.0),
    ("LensSampler", "guidance_start"): ("FLOAT", 0.0),
    ("LensSampler", "guidance_end"): ("FLOAT", 1.0),
    ("LensGuider", "cfg"): ("FLOAT", 5.0),
    ("LensGuider", "guidance_start"): ("FLOAT", 0.0),
    ("LensGuider", "guidance_end"): ("FLOAT", 1.0),
    ("LensStepCache", "threshold"): ("FLOAT", 0.1),
    ("LensStepCache", "start"): ("FLOAT", 0.1),
    ("LensStepCache", "end"): ("FLOAT", 1.0),
    ("LensStepCache", "max_consecutive"): ("INT", 3),
    ("LensImageToLatent", "base_resolution"): (["256", "512", "768", "1024", "1440"], "1024"),
    ("LensImageToLatent", "fit"): (["crop", "pad", "stretch"], "crop"),
    ("LensSampler", "denoise_by"): (["steps", "noise level"], "steps"),
    ("LensScheduler", "denoise_by"): (["steps", "noise level"], "steps"),
    ("LensNoise", "seed"): ("INT", 0),
    ("LensNoise", "variation_seed"): ("INT", 0),
    ("LensNoise", "variation_strength"): ("FLOAT", 0.0),
    ("LensNoise", "batch"): (
        ["together", "consecutive seeds", "consecutive variations"],
        "together",
    ),
    ("LensNoise", "noise"): (["host", "reference"], "reference"),
    ("LensReasoner", "preset"): (
        ["general", "photo", "poster", "diagram", "short", "caption"],
        "general",
    ),
    ("LensReasoner", "seed"): ("INT", 0),
    ("LensReasoner", "temperature"): ("FLOAT", 0.7),
    ("LensReasoner", "max_new_tokens"): ("INT", 4096),
    ("LensReasoner", "effort"): (["none", "low", "medium", "high"], "low"),
    ("LensTextEncode", "negative"): ("STRING", ""),
    ("LensTextEncode", "extended"): ("BOOLEAN", False),
    ("LensTextEncode", "template_date"): (["pinned", "today"], "pinned"),
    ("LensTextEncode", "several"): (["one prompt", "one a line", "split at |"], "one prompt"),
    ("LensReasonerAPI", "preset"): (
        ["general", "photo", "poster", "diagram", "short", "caption"],
        "general",
    ),
    ("LensReasonerAPI", "model"): ("STRING", "gpt-5.5"),
    ("LensReasonerAPI", "api_url"): ("STRING", ""),
    ("LensReasonerAPI", "seed"): ("INT", 0),
    ("LensReasonerAPI", "temperature"): ("FLOAT", 0.7),
    ("LensReasonerAPI", "max_new_tokens"): ("INT", 4096),
    ("LensReasonerAPI", "effort"): (["default", "low", "medium", "high"], "default"),
    ("LensReasonerAPI", "timeout"): ("FLOAT", 60.0),
    ("LensReasonerAPI", "on_failure"): (["error", "original prompt"], "error"),
    ("LensGrid", "negative"): ("STRING", ""),
    ("LensGrid", "seeds"): ("STRING", "1-4"),
    ("LensGrid", "base_resolution"): (["256", "512", "768", "1024", "1440"], "1024"),
    ("LensGrid", "aspect_ratio"): (list(ASPECT_RATIOS), "1:1"),
    ("LensGrid", "quantizations"): ("STRING", "none"),
    ("LensGrid", "steps"): ("INT", 0),
    ("LensGrid", "cfg"): ("FLOAT", 0.0),
    ("LensGrid", "columns"): (["auto", "models", "prompts", "seeds"], "auto"),
    ("LensEncoderLoader", "placement"): (["auto", "gpu", "stream", "cpu"], "auto"),
    ("LensEncoderLoader", "experts"): (["packed", "bfloat16"], "packed"),
    ("LensEncoderLoader", "feature_cache"): ("BOOLEAN", True),
}


def declared(node) -> dict[str, tuple]:
    """Inputs in order, required before optional, as ComfyUI sends them to the page."""
    types = node.INPUT_TYPES()
    return {name: entry for kind in ("required", "optional") for name, entry in types.get(kind, {}).items()}


def options(entry: tuple) -> list:
    """A combo's options, in either form that ComfyUI knows."""
    return entry[1]["options"] if entry[0] == "COMBO" else entry[0]


def choices(host, node_id: str) -> list[str]:
    return options(next(iter(declared(host.node_classes[node_id]).values())))


def test_these_are_all(host):
    assert {node_id for node_id in host.node_classes if node_id.startswith("Lens")} == set(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_names(host, node_id):
    display_name, inputs, outputs = NODES[node_id]
    node = host.node_classes[node_id]
    schema = node.GET_SCHEMA()
    assert schema.node_id == node_id and schema.display_name == display_name
    assert list(declared(node)) == inputs == [entry.id for entry in schema.inputs]
    assert list(zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True)) == outputs


@pytest.mark.parametrize("node_id", NODES)
def test_texts(host, node_id):
    schema = host.node_classes[node_id].GET_SCHEMA()
    assert re.fullmatch(r"Lens/[a-z]+", schema.category)
    assert schema.search_aliases and "microsoft lens" in schema.search_aliases
    texts = [schema.description, *(entry.tooltip for entry in (*schema.inputs, *schema.outputs))]
    for text in texts:
        assert text and len(text) > 8 and text.endswith("."), repr(text)
    assert not schema.is_experimental and not schema.is_deprecated


@pytest.mark.parametrize("words", ["gpt-oss", "text to image"])
def test_search_finds(host, words):
    """Besides the name of the model, which finds them all."""
    found = {node_id for node_id in NODES if words in host.node_classes[node_id].GET_SCHEMA().search_aliases}
    expected = {
        "gpt-oss": {"LensEncoderLoader", "LensTextEncode", "LensReasoner"},
        "text to image": {"LensModelLoader", "LensTextEncode", "LensEmptyLatent", "LensSampler"},
    }
    assert expected[words] <= found


@pytest.mark.parametrize("node_id", NODES)
def test_help_page(host, node_id):
    """ComfyUI shows web/docs/<node id>.md. Its tables of inputs and outputs have all of them."""
    display_name, inputs, outputs = NODES[node_id]
    text = (PACK / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {display_name}\n") and len(text) > 150
    for kind, names in (("input", inputs), ("output", [name for name, _ in outputs])):
        _, table, rest = text.partition(f"| {kind} | meaning |\n|---|---|\n")
        rows = re.findall(r"^\| ([^|]+) \|", rest.partition("\n\n")[0], re.MULTILINE)
        assert not table or ", ".join(rows).split(", ") == names


def test_help_page_of_sizes():
    """The table in LensEmptyLatent's page is the code's."""
    text = (PACK / "web" / "docs" / "LensEmptyLatent.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows if not row[0].startswith("-")}
    ratios = table.pop("base")
    assert len(ratios) == 5
    for base in BASE_RESOLUTIONS:
        sizes = [f"{width}x{height}" for height, width in (bucket(base, ratio) for ratio in ratios)]
        assert table[str(base)] == sizes


@pytest.mark.parametrize("node_id, name", SETTINGS)
def test_settings(host, node_id, name):
    kind, default = SETTINGS[node_id, name]
    entry = declared(host.node_classes[node_id])[name]
    assert (options(entry) if isinstance(kind, list) else entry[0]) == kind
    assert entry[1]["default"] == default


# What came after the first version, and its default.
GUIDANCE_SETTINGS = {
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "nag_scale": 0.0,
    "nag_tau": 2.5,
    "nag_alpha": 0.25,
}


def test_what_older_workflows_lack_is_optional(host):
    """A workflow of the first version names an encoder, a prompt and a negative; nothing else."""
    optional = {
        (node_id, name)
        for node_id in NODES
        for name in host.node_classes[node_id].INPUT_TYPES().get("optional", {})
    }
    assert optional == {
        ("LensTextEncode", "negative"),
        ("LensTextEncode", "extended"),
        ("LensTextEncode", "template_date"),
        ("LensTextEncode", "several"),
        ("LensModelLoader", "quantization"),
        ("LensEncoderLoader", "placement"),
        ("LensEncoderLoader", "experts"),
        ("LensEncoderLoader", "feature_cache"),
        *((node_id, name) for node_id in ("LensSampler", "LensGuider") for name in GUIDANCE_SETTINGS),
        ("LensSampler", "denoise_by"),
        ("LensSampler", "custom_noise"),
        ("LensScheduler", "denoise_by"),
        *(("LensNoise", name) for name in ("variation_seed", "variation_strength", "batch", "noise")),
        ("LensImageToLatent", "mask"),
        ("LensQuantizeModel", "file_name"),
        ("LensQuantizeModel", "overwrite"),
        ("LensLoraLoader", "block_strengths"),
        ("LensSaveModel", "overwrite"),
        *(("LensDoctor", name) for name in ("model", "clip", "vae")),
        *(("LensGrid", name) for name in ("model", "quantizations", "steps", "cfg", "columns")),
        *(("LensGrid", f"checkpoint_{number}") for number in (1, 2, 3, 4)),
    }
    _, negative = host.run("LensTextEncode", clip=_EchoClip(), prompt="x")
    assert negative == "encoded ''"


@pytest.mark.parametrize(
    ("node_id", "widgets", "settings"),
    [
        (
            "LensSampler",
            [42, "randomize", 20, 4.5, "reference", 0.5],
            {
                **{"seed": 42, "steps": 20, "cfg": 4.5, "noise": "reference", "denoise": 0.5},
                **GUIDANCE_SETTINGS,
                "denoise_by": "steps",
            },
        ),
        ("LensGuider", [4.5], {"cfg": 4.5, **GUIDANCE_SETTINGS}),
        ("LensScheduler", [20, 0.5], {"steps": 20, "denoise": 0.5, "denoise_by": "steps"}),
        (
            "LensNoise",
            [42, "randomize"],
            {
                **{"seed": 42, "variation_seed": 0, "variation_strength": 0.0},
                **{"batch": "together", "noise": "reference"},
            },
        ),
    ],
)
def test_widgets_of_older_workflows_keep_their_places(host, node_id, widgets, settings):
    """A workflow stores values by position: what is new stands behind them, at what it was without."""
    node = {"id": 1, "type": node_id, "widgets_values": widgets}
    info = {node_id: {"input": host.node_classes[node_id].INPUT_TYPES()}}
    prompt = to_prompt({"nodes": [node], "links": []}, info)
    assert prompt["1"]["inputs"] == settings


class _EchoClip:
    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return f"encoded {tokens!r}"


def test_seed_changes_after_each_run(host):
    for node_id in ("LensSampler", "LensNoise"):
        entry = declared(host.node_classes[node_id])["seed"][1]
        assert entry["control_after_generate"] and entry["max"] == 2**64 - 1


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("base", BASE_RESOLUTIONS)
def test_empty_latent(host, base, ratio):
    latent, width, height = host.run(
        "LensEmptyLatent", base_resolution=str(base), aspect_ratio=ratio, batch_size=2
    )
    assert (height, width) == bucket(base, ratio)
    assert latent["samples"].shape == (2, 128, height // 16, width // 16)
    assert not latent["samples"].any()
    wide, tall = map(int, ratio.split(":"))
    assert width / height == pytest.approx(wide / tall, rel=0.05)


def test_loaders_list_files_and_folders(host):
    folders = {"Lens-tiny", "Lens-Turbo-tiny"}
    singles = {
        "LensModelLoader": {"lens_tiny_bf16.safetensors", "lens_turbo_tiny_bf16.safetensors"},
        "LensEncoderLoader": {"gpt_oss_tiny_mxfp4.safetensors"},
        "LensVAELoader": {"flux2_tiny_vae.safetensors"},
    }
    for node_id, files in singles.items():
        listed = choices(host, node_id)
        assert folders | files <= set(listed)
        assert len(listed) == len(set(listed))
        first_folder = min(listed.index(name) for name in folders)
        assert all(listed.index(name) < first_folder for name in files), "files come first"


def test_shards_are_listed_as_their_folder(host, own_models, tiny_folder):
    """An encoder folder of shards is one entry; its shards, alone of no use, are none."""
    shutil.copytree(tiny_folder / "text_encoder", own_models / "text_encoders" / "gpt-oss-20b-tiny")
    tokenizer = tiny_folder / "tokenizer" / "tokenizer.json"
    shutil.copy(tokenizer, own_models / "text_encoders" / "gpt-oss-20b-tiny")
    listed = choices(host, "LensEncoderLoader")
    assert "gpt-oss-20b-tiny" in listed
    assert not [name for name in listed if "-of-" in name]
    (clip,) = host.run("LensEncoderLoader", encoder_name="gpt-oss-20b-tiny")
    assert clip.tokenize("x")["gpt_oss"][0]


def test_new_files_appear_without_restart(host, own_models, tiny_models, tiny_folder):
    """Pressing R asks for INPUT_TYPES again."""
    name = "lens_new.safetensors"
    assert name not in choices(host, "LensModelLoader")
    shutil.copy(tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors", own_models / "new")
    (own_models / "new").rename(own_models / "diffusion_models" / name)
    assert name in choices(host, "LensModelLoader")
    assert "New-Lens" not in choices(host, "LensVAELoader")
    shutil.copytree(tiny_folder / "vae", own_models / "lens" / "New-Lens" / "vae")
    assert "New-Lens" in choices(host, "LensVAELoader")
    assert "New-Lens" not in choices(host, "LensModelLoader"), "it has no transformer/"
    (own_models / "diffusion_models" / name).unlink()
    assert name not in choices(host, "LensModelLoader")


def test_files_in_subfolders(host, own_models, tiny_models):
    """ComfyUI lists them with their folder; the name alone decides the variant."""
    folder = own_models / "diffusion_models" / "turbo_things"
    folder.mkdir()
    shutil.copy(
        tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors", folder / "lens_base.safetensors"
    )
    [name] = [name for name in choices(host, "LensModelLoader") if "turbo_things" in name]
    model, steps, _ = host.run("LensModelLoader", model_name=name, dtype="auto")
    # The tiny files say in their metadata what they are, which weighs more than a name.
    assert steps == 20 and model.model.diffusion_model.config.num_layers == 3


@pytest.mark.parametrize(
    "name, steps, cfg",
    [
        ("Lens-tiny", 20, 5.0),
        ("Lens-Turbo-tiny", 4, 1.0),
        ("lens_tiny_bf16.safetensors", 20, 5.0),
        ("lens_turbo_tiny_bf16.safetensors", 4, 1.0),
    ],
)
def test_published_settings(host, name, steps, cfg):
    model, *settings = host.run("LensModelLoader", model_name=name, dtype="auto")
    assert settings == [steps, cfg]
    assert isinstance(settings[0], int) and isinstance(settings[1], float)
    assert model.model.diffusion_model.config.num_layers == 3


@pytest.mark.parametrize(
    "name, metadata, steps, cfg",
    [
        ("Lens_TURBO_fp32.safetensors", None, 4, 1.0),
        ("lens-base.safetensors", None, 50, 5.0),
        ("lens_database.safetensors", None, 20, 5.0),
        ("renamed.safetensors", {"lens.variant": "Lens-Turbo"}, 4, 1.0),
        ("turbo_but_not.safetensors", {"lens.variant": "Lens-Base"}, 50, 5.0),
    ],
)
def test_settings_follow_name_and_metadata(host, own_models, tiny_models, name, metadata, steps, cfg):
    weights = load_file(tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors")
    save_file(weights, own_models / "diffusion_models" / name, metadata=metadata)
    _, *settings = host.run("LensModelLoader", model_name=name, dtype="auto")
    assert settings == [steps, cfg]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_dtype(host, draw, dtype):
    """The CPU computes in fp32 whatever the weights are held in."""
    model, *_ = host.run("LensModelLoader", model_name="lens_tiny_bf16.safetensors", dtype=dtype)
    held = {parameter.dtype for parameter in model.model.diffusion_model.parameters()}
    assert held == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}
    assert model.model.get_dtype_inference() == torch.float32
    assert draw(model=model)["samples"].isfinite().all()


@pytest.mark.parametrize("flag", ["fp16_unet", "fp8_e4m3fn_unet"])
def test_start_flags_for_what_lens_cannot_do(host, draw, monkeypatch, caplog, flag):
    """With --fp16-unet a picture would be black; the flag is for the user's other models."""
    from comfy.cli_args import args

    monkeypatch.setattr(args, flag, True)
    model, *_ = host.run("LensModelLoader", model_name="lens_tiny_bf16.safetensors", dtype="auto")
    assert {parameter.dtype for parameter in model.model.diffusion_model.parameters()} == {torch.bfloat16}
    assert "Lens is loaded in bfloat16 instead" in caplog.text
    assert draw(model=model)["samples"].isfinite().all()


def test_importing_the_pack_imports_no_diffusers():
    """diffusers takes seconds; a server's start pays for it only with the first VAE."""
    import subprocess
    import sys

    code = (
        "import sys, lens_core.loading; "
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACK)
