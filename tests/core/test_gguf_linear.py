"""GGUF's block types as number * scale + zero: every type against the gguf package, and what a file holds."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lens_core.errors import CheckpointError
from lens_core.loading import open_denoiser, open_encoder
from lens_core.quant.linear import unpack
from lens_core.weights import tensor_info
from lens_core.weights.gguf import GgufCheckpoint
from lens_core.weights.gguf_linear import TYPES, decode, empty, gguf_layers, repack
from lens_core.weights.keymap import DENOISER, rename
from lens_core.weights.kind import describe
from lens_core.weights.quantized import warn_coarse
from lens_core.weights.tensor_info import TensorInfo
from tests import denoiser_gguf
from tests.compare import relative_l2

# Where a block's fp16 numbers lie: its factors and, of Q4_1 and Q5_1, its minimum.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
# How many times a block's factor its zero point is: in fp16 too, so larger factors are no good file's.
ZEROS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
LARGEST = 65504.0
COLUMNS = 512


def random_blocks(kind: str, rows: int, seed: int = 0) -> Tensor:
    """Bytes u8 [rows, bytes of 512 numbers] with every fp16 factor of a good file as likely as any other:
    negative, subnormal and largest ones too."""
    row = TYPES[kind]
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, COLUMNS // row.block, row.nbytes)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for at in HALVES.get(kind, (0,)):
        high = raw[..., at + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40
        factor = raw[..., at : at + 2].clone().view(torch.float16)
        too_large = factor.float().abs() > LARGEST / ZEROS.get(kind, 1)
        high[too_large[..., 0]] ^= 0x40
    return raw.flatten(1)


def values_of(raw: Tensor, kind: str) -> Tensor:
    """What the gguf package says that these bytes stand for, fp32 [N, K]."""
    return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))


def stored(path: Path, raw: Tensor, kind: str) -> TensorInfo:
    """The bytes as a tensor of a file, at an odd place in it, as no alignment is asked for."""
    path.write_bytes(b"odd" + raw.numpy().tobytes())
    row = TYPES[kind]
    shape = (len(raw), raw.shape[1] // row.nbytes * row.block)
    return TensorInfo(path, shape, kind, 3, raw.numel())


def layers_of(path: Path) -> tuple[GgufCheckpoint, dict[str, str], dict]:
    checkpoint = GgufCheckpoint(path)
    source = rename(checkpoint.header, DENOISER)
    return checkpoint, source, gguf_layers(checkpoint, source)


@pytest.mark.parametrize("kind", TYPES)
def test_the_table_has_the_sizes_of_the_gguf_package(kind: str):
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert (TYPES[kind].block, TYPES[kind].nbytes) == sizes


@pytest.mark.parametrize("kind", TYPES)
def test_any_bytes_stand_for_exactly_what_the_gguf_package_says(kind: str, tmp_path: Path):
    raw = random_blocks(kind, 256)
    packed = repack(stored(tmp_path / "x", raw, kind), "layer")
    want = values_of(raw, kind)
    assert want.isfinite().all()
    assert torch.equal(unpack(packed, torch.float32), want)
    assert torch.equal(unpack(packed, torch.bfloat16), want.bfloat16())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("byte", [0, 0x0F, 0xF0, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("factor", [0.0, LARGEST, -LARGEST, 2.0**-24, -(2.0**-24)])
def test_edge_bytes_with_edge_factors_are_exact(kind: str, byte: int, factor: float, tmp_path: Path):
    raw = torch.full((3, COLUMNS // TYPES[kind].block, TYPES[kind].nbytes), byte, dtype=torch.uint8)
    put_factors(raw, kind, max(-LARGEST / ZEROS.get(kind, 1), min(factor, LARGEST / ZEROS.get(kind, 1))))
    raw = raw.flatten(1)
    packed = repack(stored(tmp_path / "x", raw, kind), "layer")
    assert torch.equal(unpack(packed, torch.float32), values_of(raw, kind))


def put_factors(raw: Tensor, kind: str, factor: float) -> None:
    """Set all fp16 numbers of blocks u8 [..., bytes]."""
    for at in HALVES.get(kind, (0,)):
        raw[..., at : at + 2] = torch.tensor([factor], dtype=torch.float16).view(torch.uint8)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        *((kind, factor) for kind in TYPES for factor in (float("inf"), -float("inf"), float("nan"))),
        *((kind, sign * LARGEST / times * 1.01) for kind, times in ZEROS.items() for sign in (1, -1)),
    ],
)
def test_a_factor_that_no_good_file_has_is_damage(kind: str, factor: float, tmp_path: Path):
    raw = random_blocks(kind, 7).unflatten(-1, (-1, TYPES[kind].nbytes))
    put_factors(raw[5, -1], kind, factor)
    with pytest.raises(CheckpointError) as caught:
        repack(stored(tmp_path / "x", raw.flatten(1), kind), "txt_in")
    assert str(caught.value) == (
        f"x is damaged: the weight of txt_in, in {kind}, has scales that are no numbers or far too large. "
        "Download it again."
    )


@pytest.mark.parametrize("kind", TYPES)
def test_a_quantised_weight_is_read_as_near_as_its_bits_allow(kind: str, tmp_path: Path):
    weight = torch.randn(96, COLUMNS, generator=torch.Generator().manual_seed(1)) / 20
    raw = torch.from_numpy(denoiser_gguf.quantize(weight.numpy(), kind))
    got = unpack(repack(stored(tmp_path / "x", raw, kind), "layer"), torch.float32)
    assert torch.equal(got, values_of(raw, kind))
    # 32 normal numbers span about 4.1 deviations, in steps of a fifteenth: an even error of 0.27 / sqrt(12) =
    # 0.079 of the whole at 4 bits, and half of it each bit; 0.08 to 0.09 for types around zero.
    error = relative_l2(got, weight) * 2 ** (TYPES[kind].bits - 4)
    assert 0.06 < error < 0.1


@pytest.mark.parametrize("kind", TYPES)
def test_pieces_make_what_the_whole_makes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw = random_blocks(kind, 37)
    info = stored(tmp_path / "x", raw, kind)
    whole = repack(info, "layer")
    monkeypatch.setattr(tensor_info, "_PIECE", 5 * raw.shape[1])
    read, largest = TensorInfo.bytes, []

    def watch(self: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        largest.append(read(self, start, stop))
        return largest[-1]

    monkeypatch.setattr(TensorInfo, "bytes", watch)
    pieces = repack(info, "layer")
    assert [len(piece) for piece in largest] == [5] * 7 + [2]
    assert all(torch.equal(a, b) for a, b in zip(pieces[1:], whole[1:], strict=True))


@pytest.mark.parametrize("kind", TYPES)
def test_a_packed_weight_has_the_shapes_and_kinds_of_its_format(kind: str, tmp_path: Path):
    packed = repack(stored(tmp_path / "x", random_blocks(kind, 5), kind), "layer")
    bits, group = (4 if kind.startswith("Q4") else 8), (16 if kind == "Q6_K" else 32)
    form = packed.form
    assert (form.name, form.bits, form.group, form.kind) == ("lens_affine", bits, group, None)
    assert packed.values.dtype == torch.uint8
    assert packed.values.shape == (5, COLUMNS * bits // 8)
    assert packed.zero is not None
    dtype = torch.float32 if kind.endswith("_K") else torch.float16
    for part in (packed.scale, packed.zero):
        assert (part.dtype, part.shape) == (dtype, (5, COLUMNS // group))
    planned = empty((5, COLUMNS), kind, "meta")
    assert planned.form == packed.form
    for made, part in zip(packed[1:], planned[1:], strict=True):
        assert (made.dtype, made.shape) == (part.dtype, part.shape)


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_stay_in_their_bits(kind: str):
    """Otherwise four of them would be cut off as they are packed, and a byte would not be worth its scale."""
    numbers, _, _ = decode(random_blocks(kind, 64), kind)
    assert (numbers.min(), numbers.max()) == (0, 2 ** TYPES[kind].bits - 1)


@pytest.mark.parametrize("kind", TYPES)
def test_a_single_block_at_an_odd_byte_is_decoded(kind: str):
    row = TYPES[kind]
    raw = random_blocks(kind, 1)[:, : row.nbytes].contiguous()
    odd = torch.cat((torch.zeros(1, dtype=torch.uint8), raw[0]))[1:].view(1, -1)
    assert all(torch.equal(a, b) for a, b in zip(decode(odd, kind), decode(raw, kind), strict=True))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_denoisers_linears_are_found_and_read(kind: str, prefix: str, tmp_path: Path):
    written = denoiser_gguf.write_denoiser(tmp_path / "x.gguf", kind, prefix=prefix, vectors="BF16")
    checkpoint, source, layers = layers_of(tmp_path / "x.gguf")
    linears = {name: used for name, (used, _) in written.items() if used in TYPES}
    assert kind in linears.values()
    assert {f"{name}.weight": used for name, (_, used) in layers.items()} == linears
    for layer, (form, _) in layers.items():
        name = f"{layer}.weight"
        packed = repack(checkpoint.header[source[name]], layer)
        assert packed.form == form
        assert torch.equal(unpack(packed, torch.float32), written[name][1])
        assert torch.equal(unpack(packed, torch.bfloat16), checkpoint.read(source[name]))
    for name in written.keys() - linears.keys():
        assert torch.equal(checkpoint.read(source[name], torch.float32), written[name][1])


@pytest.mark.parametrize("kind", denoiser_gguf.PLAIN)
def test_plain_numbers_are_no_quantised_layers(kind: str, tmp_path: Path):
    denoiser_gguf.write_denoiser(tmp_path / "x.gguf", kind)
    assert layers_of(tmp_path / "x.gguf")[2] == {}


def test_vectors_in_blocks_are_no_layers_and_are_read_as_plain_numbers(tmp_path: Path):
    written = denoiser_gguf.write_denoiser(tmp_path / "x.gguf", "F16", vectors="Q8_0")
    checkpoint, source, layers = layers_of(tmp_path / "x.gguf")
    assert layers == {}
    name = "transformer_blocks.0.img_norm1.weight"
    assert written[name][0] == "Q8_0"
    assert torch.equal(checkpoint.read(source[name], torch.float32), written[name][1])


def test_a_matrix_that_is_no_weight_is_no_layer(tmp_path: Path):
    write_raw(tmp_path / "x.gguf", "img_in.table", np.zeros((4, 34), dtype=np.uint8), "Q8_0")
    assert layers_of(tmp_path / "x.gguf")[2] == {}


def write_raw(path: Path, name: str, raw: np.ndarray, kind: str) -> None:
    writer = gguf.GGUFWriter(str(path), "lens")
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["IQ4_XS", "IQ2_XXS", "Q2_K", "Q3_K", "TQ1_0", "MXFP4"])
def test_a_type_that_is_not_read_is_named_with_those_that_are(kind: str, tmp_path: Path):
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    write_raw(tmp_path / "x.gguf", "img_in.weight", np.zeros((4, size), dtype=np.uint8), kind)
    with pytest.raises(CheckpointError) as caught:
        layers_of(tmp_path / "x.gguf")
    message = str(caught.value)
    assert message.startswith(f"x.gguf stores img_in.weight as {kind}; this version reads Q4_0, ")
    assert all(re.search(rf"\b{name}\b", message) for name in (*TYPES, *denoiser_gguf.PLAIN))
    assert message.endswith("Choose a file of one of these, such as q8_0.")


def test_rows_of_no_whole_blocks_are_damage(tmp_path: Path):
    """Two rows of 16 numbers are one block of Q8_0, which no quantiser would write."""
    write_raw(tmp_path / "x.gguf", "img_in.weight", np.zeros((1, 34), dtype=np.uint8), "Q8_0")
    content = (tmp_path / "x.gguf").read_bytes()
    at = content.index(b"img_in.weight") + len(b"img_in.weight") + 4
    sizes = np.array([16, 2], dtype="<u8").tobytes()
    (tmp_path / "x.gguf").write_bytes(content[:at] + sizes + content[at + 16 :])
    with pytest.raises(CheckpointError, match=r"x\.gguf is damaged: img_in\.weight has rows of 16 numbers"):
        layers_of(tmp_path / "x.gguf")


def only_modulation(kind: str, first: int = 0):
    """A type by name: ``kind`` for modulation from block ``first`` on, Q8_0 for all others."""

    def choose(name: str) -> str:
        match = re.search(r"transformer_blocks\.(\d+)\.\w+_mod\.1\.weight$", name)
        return kind if match and int(match[1]) >= first else "Q8_0"

    return choose


def test_coarse_modulation_is_warned_of_once_with_its_first_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    denoiser_gguf.write_denoiser(tmp_path / "x.gguf", only_modulation("Q5_0", first=1))
    with caplog.at_level(logging.WARNING):
        file = open_denoiser(tmp_path / "x.gguf")
    want = [f"transformer_blocks.{block}.{stream}_mod.1" for block in (1, 2) for stream in ("img", "txt")]
    assert all(file.stored[name].packed.form.bits == 8 for name in want), "though they are held in a byte"
    (record,) = caplog.records
    first = next(name for name in file.stored if name in want)
    message = record.getMessage()
    assert message.startswith(
        f"x.gguf: 4 modulation layers have fewer than 8 bits (the first is {first} in Q5_0)"
    )
    assert "choose a file that has them in 8 bits or more, such as q8_0" in message


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_fine_modulation_is_not_warned_of(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    choose = only_modulation(kind)
    denoiser_gguf.write_denoiser(
        tmp_path / "x.gguf", lambda name: choose(name) if "_mod." in name else "Q4_0"
    )
    with caplog.at_level(logging.WARNING):
        file = open_denoiser(tmp_path / "x.gguf")
    assert not caplog.records
    bits = {part.packed.form.bits for part in file.stored.values()}
    assert 4 in bits, "others may be as coarse as they like"


@pytest.mark.parametrize("bits", [1, 7, 8, 16])
def test_coarse_is_below_8_bits(bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    denoiser_gguf.write_denoiser(tmp_path / "x.gguf", "F16")
    checkpoint = GgufCheckpoint(tmp_path / "x.gguf")
    names = ["transformer_blocks.7.img_mod.1", "transformer_blocks.7.img_mlp.w1", "img_in"]
    coarse = warn_coarse(checkpoint, dict.fromkeys(names, (bits, "some format")))
    assert coarse == (names[:1] if bits < 8 else [])
    assert len(caplog.records) == len(coarse)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("architecture", ["lens", "flux", "gpt-oss"])
def test_a_denoiser_is_recognised_by_its_tensors(tmp_path: Path, prefix: str, architecture: str):
    denoiser_gguf.write_denoiser(tmp_path / "x.gguf", prefix=prefix, architecture=architecture)
    assert describe(GgufCheckpoint(tmp_path / "x.gguf")) == "a Lens denoiser in GGUF"
    with pytest.raises(CheckpointError, match=r"x\.gguf is a Lens denoiser in GGUF; expected a GPT-OSS enc"):
        open_encoder(tmp_path / "x.gguf")
