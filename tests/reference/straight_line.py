"""A whole Lens picture, line by line, in plain torch on the CPU: the oracle of the parity tests.

Lens (Microsoft's text-to-image model) is a GPT-OSS text encoder, a joint image-and-text denoiser and the
FLUX.2 VAE. Here a folder in the diffusers layout is rendered the slow and obvious way: weights in a dict,
float32 (angles and schedule float64), one picture at a time, nothing cached, fused, padded or left out.

It must stay independent of ``lens_core``: nothing is imported from there and no code is shared with it.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

Weights = dict[str, Tensor]
Model = dict[str, Any]
HEAD = 64  # channels of a head in the denoiser
CAPTURED = (5, 11, 17, 23)  # the encoder layers whose output the denoiser reads
FP4 = torch.tensor((0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6), dtype=torch.float64)
BEFORE_PROMPT = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2026-05-23\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
    "<|start|>developer<|message|># Instructions\n\nDescribe the image by detailing the color, shape, size, "
    "texture, quantity, text, spatial relationships of the objects and background.\n\n<|end|>"
    "<|start|>user<|message|>"
)
AFTER_PROMPT = (
    "<|end|><|start|>assistant<|channel|>analysis<|message|>Need to generate one image according to the "
    "description.<|end|><|start|>assistant<|channel|>final<|message|>"
)


def load_folder(folder: str | Path) -> Model:
    """Denoiser (float32) and encoder (as stored) weights by name, the tokenizer and the VAE of a folder."""
    folder, weights = Path(folder), {}
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = folder / part / f"{stem}.safetensors.index.json"
        files = {f"{stem}.safetensors"}
        if index.exists():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = [load_file(folder / part / file) for file in files]
        weights[part] = {name: tensor for shard in shards for name, tensor in shard.items()}
    return {
        "denoiser": {name: tensor.float() for name, tensor in weights["transformer"].items()},
        "encoder": weights["text_encoder"],
        "tokenizer": Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")),
        "vae": AutoencoderKLFlux2.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval(),
    }


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """A linear layer with bias."""
    return F.linear(x, w[name + ".weight"].float(), w[name + ".bias"].float())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square, times a learned scale."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def encoder_rope(length: int, size: int) -> tuple[Tensor, Tensor]:
    """YaRN cosines and sines [S, 1, size/2] of heads of ``size`` channels: theta 150000, factor 32, beta 32
    and 1, original context 4096."""
    # The pairs that turn 32 times and once within the original context; fractional, not truncated.
    low, high = (size * math.log(4096 / (2 * math.pi * beta)) / (2 * math.log(150000)) for beta in (32, 1))
    pair = torch.arange(size // 2, dtype=torch.float64)
    frequency = 150000 ** (-2 * pair / size)
    ramp = ((pair - low) / (high - low)).clamp(0, 1)  # 0: the frequency stays; 1: it is divided by the factor
    frequency = frequency * (1 - ramp) + frequency / 32 * ramp
    angle = torch.arange(length, dtype=torch.float64)[:, None, None] * frequency
    scale = 0.1 * math.log(32) + 1  # cosines and sines times 1.3465736
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def encoder_attention(w: Weights, at: str, x: Tensor, sliding: bool) -> Tensor:
    """Causal grouped-query attention with a learned sink logit per query head."""
    size = w[at + "o_proj.weight"].shape[1] // len(w[at + "sinks"])  # 64 channels a head in GPT-OSS-20B
    q, k, v = (linear(w, at + name, x).view(len(x), -1, size) for name in ("q_proj", "k_proj", "v_proj"))
    cos, sin = encoder_rope(len(x), size)

    def rotate(y: Tensor) -> Tensor:  # the two halves of a head are paired
        a, b = y.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    q, k, sinks = rotate(q), rotate(k), w[at + "sinks"].float()
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))  # query minus key
    visible = (distance >= 0) & (distance < 128) if sliding else distance >= 0
    outputs = []
    for head, sink in enumerate(sinks):
        kv = head // (len(sinks) // k.shape[1])  # kv head j serves query heads j*g ... (j+1)*g - 1
        scores = (q[:, head] @ k[:, kv].T / math.sqrt(size)).masked_fill(~visible, -math.inf)
        # The sink joins the denominator of the softmax only: a last column, whose probability is dropped.
        probability = torch.cat([scores, sink.expand(len(x), 1)], -1).softmax(-1)[:, :-1]
        outputs.append(probability @ v[:, kv])
    return linear(w, at + "o_proj", torch.cat(outputs, -1))


def expert_linear(w: Weights, name: str, expert: int, x: Tensor) -> Tensor:
    """One expert's MXFP4 matrix, blocks [out, in/32, 16] and scales [out, in/32], with its bias."""
    blocks, scales = w[name + "_blocks"][expert], w[name + "_scales"][expert]
    # Byte j of a group: input 2j in the low nibble, 2j + 1 in the high one; the scale is 2^(byte - 127).
    values = FP4[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]
    weight = (values * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2).float()
    return F.linear(x, weight, w[name + "_bias"][expert].float())


def mixture_of_experts(w: Weights, at: str, x: Tensor) -> Tensor:
    """Top-4 of the router's logits, softmax over these 4, weighted sum of the 4 experts."""
    logits, chosen = linear(w, at + "router", x).topk(4, -1)
    share = logits.softmax(-1)
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        y = expert_linear(w, at + "experts.gate_up_proj", expert, x[token])
        gate, up = y[:, 0::2].clamp(max=7), y[:, 1::2].clamp(-7, 7)  # even rows: gate, odd rows: up
        y = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        out[token] += share[token, slot, None] * expert_linear(w, at + "experts.down_proj", expert, y)
    return out


@torch.no_grad()
def encode(model: Model, prompt: str) -> list[Tensor]:
    """The captured layers' features, 4 times [S, H], of the prompt's tokens and of everything after them."""
    w, tokenizer = model["encoder"], model["tokenizer"]
    ids = tokenizer.encode(BEFORE_PROMPT + prompt + AFTER_PROMPT, add_special_tokens=False).ids
    prefix = len(tokenizer.encode(BEFORE_PROMPT, add_special_tokens=False).ids)
    x = w["model.embed_tokens.weight"][ids].float()
    features = []
    for layer in range(CAPTURED[-1] + 1):
        at = f"model.layers.{layer}."
        y = rms_norm(x, w[at + "input_layernorm.weight"], 1e-5)
        x = x + encoder_attention(w, at + "self_attn.", y, sliding=(layer + 1) % 2 == 1)
        y = rms_norm(x, w[at + "post_attention_layernorm.weight"], 1e-5)
        x = x + mixture_of_experts(w, at + "mlp.", y)
        if layer in CAPTURED:  # the residual stream after the layer, without the encoder's final norm
            features.append(x[prefix:])
    return features


def denoiser_rope(h: int, w: int, text: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N + S, 1, 32] of the joint sequence."""
    # Image ids (frame 0, row, column) are centred: rows -(h - h//2) ... h//2 - 1, columns likewise.
    ids = [(0, row - (h - h // 2), column - (w - w // 2)) for row in range(h) for column in range(w)]
    # Text position p sits at max(h//2, w//2) + p on all three axes.
    ids += [(max(h // 2, w // 2) + p,) * 3 for p in range(text)]
    position = torch.tensor(ids, dtype=torch.float64)
    angles = []
    for axis, channels in enumerate((8, 28, 28)):  # 8 rotate by frame, 28 by row, 28 by column
        frequency = 10000 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles.append(position[:, axis, None, None] * frequency)
    return torch.cat(angles, -1).cos().float(), torch.cat(angles, -1).sin().float()


def block(weights: Weights, at: str, streams: list[Tensor], temb: Tensor, rope: tuple) -> list[Tensor]:
    """One block over the streams [image, text], or [image] where there is no text."""
    w = {name.removeprefix(at): tensor for name, tensor in weights.items() if name.startswith(at)}
    cos, sin = rope

    def rotate(y: Tensor) -> Tensor:  # adjacent channels are paired (a complex product)
        a, b = y[..., 0::2], y[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    qkv, modulations = [], []
    for x, s, added in zip(streams, ("img", "txt"), ("", "added_"), strict=False):
        # Modulation by silu(temb): two triples (shift, scale, gate), for attention and for the MLP.
        modulations.append(linear(w, s + "_mod.1", F.silu(temb)).chunk(6))
        shift, scale = modulations[-1][:2]
        y = rms_norm(x, w[s + "_norm1.weight"], 1e-6) * (1 + scale) + shift
        q, k, v = linear(w, f"attn.{s}_qkv", y).view(len(x), 3, -1, HEAD).unbind(1)
        q = rms_norm(q, w[f"attn.norm_{added}q.weight"], 1e-6)
        k = rms_norm(k, w[f"attn.norm_{added}k.weight"], 1e-6)
        qkv.append((q, k, v))
    # Joint sequence, image first, then text; RoPE on both streams; plain softmax attention.
    q, k, v = (torch.cat(parts) for parts in zip(*qkv, strict=True))
    scores = torch.einsum("qhc,khc->hqk", rotate(q), rotate(k)) / math.sqrt(HEAD)
    attended = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1).split([len(x) for x in streams])
    after = []
    for i, (s, out) in enumerate((("img", "attn.to_out.0"), ("txt", "attn.to_add_out"))[: len(streams)]):
        attention_gate, shift, scale, gate = modulations[i][2:]
        x = streams[i] + attention_gate * linear(w, out, attended[i])  # x += gate * out
        y = rms_norm(x, w[s + "_norm2.weight"], 1e-6) * (1 + scale) + shift
        y = F.silu(F.linear(y, w[s + "_mlp.w1.weight"])) * F.linear(y, w[s + "_mlp.w3.weight"])
        after.append(x + gate * F.linear(y, w[s + "_mlp.w2.weight"]))
    return after


@torch.no_grad()
def velocity(model: Model, x: Tensor, features: list[Tensor] | None, sigma: float, h: int, w: int) -> Tensor:
    """The denoiser's velocity [N, 128] for latents [N, 128]; features None: no text tokens at all."""
    weights = model["denoiser"]
    streams = [linear(weights, "img_in", x)]
    if features is not None:
        normed = [rms_norm(f, weights[f"txt_norm.{i}.weight"], 1e-5) for i, f in enumerate(features)]
        streams.append(linear(weights, "txt_in", torch.cat(normed, -1)))
    # t = sigma; 256 sinusoids of 1000 t, cosines first; linear_1, SiLU, linear_2.
    angle = 1000 * sigma * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    at = "time_text_embed.timestep_embedder.linear_"
    temb = linear(weights, at + "1", torch.cat([angle.cos(), angle.sin()]).float())
    temb = linear(weights, at + "2", F.silu(temb))
    rope = denoiser_rope(h, w, sum(len(text) for text in streams[1:]))
    for i in range(len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")})):
        streams = block(weights, f"transformer_blocks.{i}.", streams, temb, rope)
    # norm_out: LayerNorm without affine, modulated by silu(temb): scale first, then shift.
    scale, shift = linear(weights, "norm_out.linear", F.silu(temb)).chunk(2)
    y = F.layer_norm(streams[0], streams[0].shape[-1:], eps=1e-6) * (1 + scale) + shift
    return linear(weights, "proj_out", y)


def schedule(tokens: int, steps: int) -> list[float]:
    """The steps + 1 sigmas, from 1 to 0, of a picture of so many image tokens."""
    mu = m200 = 0.00016927 * tokens + 0.45666666
    if tokens <= 4300:
        a = (m200 - (8.73809524e-05 * tokens + 1.89833333)) / 190
        mu = a * steps + m200 - 200 * a
    times = np.linspace(1, 1 / steps, steps).tolist()
    return [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in times] + [0.0]


def guide(p: Tensor, u: Tensor, g: float) -> Tensor:
    """Guidance per token: c = u + g (p - u) with the norm of p over the 128 channels; c where c is 0."""
    c = u + g * (p - u)
    length = c.norm(dim=-1, keepdim=True)
    return torch.where(length == 0, c, c * p.norm(dim=-1, keepdim=True) / length)


@torch.no_grad()
def render(
    folder: str | Path,
    prompt: str,
    *,
    negative: str = "",
    height: int,
    width: int,
    steps: int,
    cfg: float,
    noise: Tensor,
    capture_latents: bool = False,
) -> np.ndarray | tuple[np.ndarray, Tensor]:
    """The picture, uint8 [height, width, 3], from the caller's noise [N, 128]; its latents too if asked."""
    model, h, w = load_folder(folder), height // 16, width // 16
    positive = encode(model, prompt)  # an empty prompt is an empty user turn
    unwanted = encode(model, negative) if cfg != 1 and negative.strip() else None  # blank: no text tokens
    x, sigmas = noise.float(), schedule(h * w, steps)
    for sigma, following in itertools.pairwise(sigmas):
        v = velocity(model, x, positive, sigma, h, w)
        if cfg != 1:  # at 1 there is no unconditional pass
            v = guide(v, velocity(model, x, unwanted, sigma, h, w), cfg)
        x = x + (following - sigma) * v  # Euler
    bn = model["vae"].bn  # its normalisation is undone on the packed 128 channels
    latent = x * torch.sqrt(bn.running_var.float() + 1e-4) + bn.running_mean.float()
    # A token's channels are ordered (c p1 p2): 32 channels (nano Lens: 8) of 2 x 2 latent pixels.
    latent = latent.view(h, w, -1, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, -1, 2 * h, 2 * w)
    image = model["vae"].decode(latent).sample[0].permute(1, 2, 0)
    image = ((image.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).contiguous().numpy()  # truncated
    return (image, x) if capture_latents else image
