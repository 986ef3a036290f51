"""Every case by its number: which files there are, what is opened, and by what."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, TypeVar

from tests.fuzz import hostile, mutators
from tests.fuzz.bases import Base, File, Gguf, ggufs, safetensors, tokenizer_json

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """Files by their names; ``path`` is what is opened ("" for the folder), for ``component``."""

    title: str
    files: Mapping[str, File]
    path: str
    component: str
    links: Mapping[str, str] | None = None


def case(number: int, seed: int = 0) -> Case:
    """The same case for the same two numbers."""
    rng = Random(f"{seed}/{number}")
    if seed == 0 and number < len(fixed()):
        return fixed()[number]
    return _pick(rng, _FAMILIES)(rng)


def _pick(rng: Random, weights: Mapping[T, int]) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]


def _safetensors(rng: Random) -> Case:
    # A VAE that is in order is built by diffusers, which takes a hundred times as long as the rest.
    title = "vae" if rng.random() < 0.01 else rng.choice([title for title in safetensors() if title != "vae"])
    good = safetensors()[title]
    mutate = _pick(rng, mutators.SAFETENSORS)
    file = mutate(rng, good)
    if rng.random() < 0.15:
        file = mutators.cut(rng, file)
    beside = {name: File.of(content) for name, content in good.beside.items()}
    return Case(
        f"{title}: {mutate.__name__}", {"x.safetensors": file, **beside}, "x.safetensors", good.component
    )


def _gguf(rng: Random) -> Case:
    title = rng.choice(list(ggufs()))
    mutate = _pick(rng, mutators.GGUF)
    file = mutate(rng, ggufs()[title])
    if rng.random() < 0.15:
        file = mutators.cut(rng, file)
    return Case(f"GGUF of a {title}: {mutate.__name__}", {"x.gguf": file}, "x.gguf", title)


def _index(rng: Random) -> Case:
    """Two shards and their index."""
    good = safetensors()["denoiser"]
    shard = good.good()
    weight_map: dict[str, Any] = {
        name: rng.choice(("a.safetensors", "b.safetensors")) for name in list(good.header)[:8]
    }
    for _ in range(rng.randint(0, 2)):
        weight_map[rng.choice(mutators.NAMES)] = rng.choice((*OUTSIDE, *mutators.NAMES, mutators.value(rng)))
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    text = mutators.dumps(rng, mutators.spoil_json(rng, content) if rng.random() < 0.5 else content)
    if rng.random() < 0.2:
        text = mutators.spoil_bytes(rng, text)
    files = {"x.safetensors.index.json": File.of(text), "a.safetensors": shard, "b.safetensors": shard}
    return Case("index", files, "", "denoiser", {"c.safetensors": "a.safetensors"})


OUTSIDE = (
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "..",
    ".",
    "..\\..\\secret",
    "C:\\secret.safetensors",
    "\\\\server\\share\\x",
    "a/../../x",
    "c.safetensors",
    "x.safetensors.index.json",
    "a.safetensors/x",
)


def _config(rng: Random) -> Case:
    """A good file, and a config.json beside it that is not."""
    title = rng.choice((*["denoiser by SDNQ"] * 4, "vae"))
    good = safetensors()[title]
    text = mutators.dumps(rng, mutators.spoil_json(rng, json.loads(good.beside["config.json"])))
    if rng.random() < 0.2:
        text = mutators.spoil_bytes(rng, text)
    files = {"x.safetensors": good.good(), "config.json": File.of(text)}
    return Case(f"config.json of {title}", files, "", good.component)


def _tokenizer(rng: Random) -> Case:
    good = ggufs()["encoder"] if rng.random() < 0.2 else safetensors()["encoder"]
    text = mutators.dumps(rng, mutators.spoil_json(rng, tokenizer_json()))
    if rng.random() < 0.3:
        text = mutators.spoil_bytes(rng, text)
    name = "x.gguf" if isinstance(good, Gguf) else "x.safetensors"
    bare = _without_tokenizer(good)
    return Case("tokenizer.json", {name: bare, "tokenizer.json": File.of(text)}, name, "encoder")


@cache
def _bare(good: str) -> File:
    base = safetensors()[good]
    start, stop = base.header["tokenizer_json"]["data_offsets"]
    header = {
        name: entry
        if name == "__metadata__"
        else {**entry, "data_offsets": [at - stop for at in entry["data_offsets"]]}
        for name, entry in base.header.items()
        if name != "tokenizer_json"
    }
    return Base("encoder", header, b"", base.size - (stop - start)).good()


def _without_tokenizer(good: Base | Gguf) -> File:
    return _bare("encoder") if isinstance(good, Base) else good.file()


_FAMILIES: dict[Callable[[Random], Case], int] = {
    _safetensors: 55,
    _gguf: 30,
    _index: 6,
    _config: 3,
    _tokenizer: 6,
}


@cache
def fixed() -> list[Case]:
    """Those that chance would not make: every hostile content under every name, for every component; good
    files cut at each place where a part ends."""
    contents = {**{title: content for title, (content, _) in hostile.named().items()}, **hostile.unnamed()}
    cases = [
        Case(title, {name: File.of(content)}, name, component)
        for title, content in contents.items()
        for name, component in _openings(len(content))
    ]
    for title, good in safetensors().items():
        file = good.good()
        ends = {
            *range(20),
            len(file.start) - 1,
            len(file.start),
            len(file.start) + 1,
            file.size - 1,
            file.size + 1,
        }
        cases += [
            Case(
                f"{title} of {end} bytes",
                {"x.safetensors": File(file.start[:end], end)},
                "x.safetensors",
                good.component,
            )
            for end in sorted(ends)
        ]
    for title, gguf in ggufs().items():
        file = gguf.file()
        cases += [
            Case(
                f"GGUF of a {title} of {end} bytes", {"x.gguf": File(file.start[:end], end)}, "x.gguf", title
            )
            for end in range(4, len(gguf.head()) + 40, 37)
        ]
    return cases


def _openings(size: int) -> list[tuple[str, str]]:
    """Large contents once; the others by several names."""
    if size > 10**5:
        return [("x.safetensors", "denoiser")]
    names = ("x.safetensors", "x.gguf", "x.pt")
    return [(name, component) for name in names for component in ("denoiser", "encoder", "vae")]
