"""Kinds of damage to an adapter's files, for damaged_files.py."""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from benchmarks.robustness.adapters import CONFIG, PREFIX, WEIGHTS, Files
from safetensors.torch import load, save
from torch import Tensor

from diffpeft.files import encoding
from diffpeft.sparse import elias_fano as positions

VALUES, POSITIONS = ".diffpruning_values.", ".diffpruning_positions."
WORDS, NUMEL = f"{PREFIX}bert.embeddings.word_embeddings{VALUES}weight", 99 * 12
HEAD, POOLER = f"{PREFIX}classifier.weight", f"{PREFIX}bert.pooler.dense.weight"
BASES = {"a base of other weights": (7, 12), "a base of another shape": (0, 16)}
"""Seed and width of other base models, by the kind of damage that loading onto them is."""
Tensors = dict[str, Tensor]
Change = Callable[[Files, random.Random], object]


def regions(data: bytearray) -> dict[str, list[int]]:
    """The bytes of each part of a weights file: header, values, checksums ("seals"), positions, heads."""
    start = 8 + int.from_bytes(data[:8], "little")
    found = {"header": [*range(start)], "values": [], "seals": [], "positions": [], "heads": []}
    for key, entry in json.loads(data[8:start]).items():
        if key != "__metadata__":
            own = [start + offset for offset in range(*entry["data_offsets"])]
            size = encoding.CHECKSUM_BYTES if POSITIONS in key else 0
            found["seals"] += own[:size]
            found["positions" if size else "values" if VALUES in key else "heads"] += own[size:]
    return found


def flip(data: bytearray, rng: random.Random, among: Sequence[int] = (), bits: int = 1) -> None:
    """Flip random bits of these bytes, by default of all."""
    for byte in rng.choices(among or range(len(data)), k=bits):
        data[byte] ^= 1 << rng.randrange(8)


def zero(data: bytearray, start: int, size: int) -> None:
    """Overwrite a block with zeros."""
    data[start : start + size] = bytes(len(data[start : start + size]))


def swap(tensors: Tensors, rng: random.Random, *parts: str) -> None:
    """Exchange values or positions of a parameter between the two layers."""
    first = rng.choice([key for key in tensors if "layer.0." in key and VALUES in key])
    for key in (first.replace(VALUES, part) for part in parts):
        other = key.replace("layer.0.", "layer.1.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def recount(counts: dict[str, int], rng: random.Random) -> None:
    """Make a random count one too large or one too small."""
    counts[rng.choice([*counts])] += rng.choice((-1, 1))


def spoil_head(tensors: Tensors, fields: dict[str, Any], rng: random.Random) -> None:
    """Make an entry of a head NaN or infinite, and renew the checksum."""
    tensors[HEAD][0, rng.randrange(12)] = rng.choice((math.nan, math.inf))
    fields["heads_checksum"] = encoding.checksums_of(tensors).heads


def rewrite_diff(tensors: Tensors, rng: random.Random, change: Callable[..., Any]) -> None:
    """Change positions and values of the word embeddings, and renew the checksum.

    `change` gets the positions, the values, and the index of a position whose high bits are those of its successor: the
    encoding can put only such positions out of order.
    """
    values, packed = tensors[WORDS], WORDS.replace(VALUES, POSITIONS)
    found = encoding.unpack(tensors[packed], len(values), NUMEL)
    high = found >> positions.low_bits(len(found), NUMEL)
    index = rng.choice((high[1:] == high[:-1]).nonzero().flatten().tolist())
    found, values = change(found.tolist(), values.tolist(), index, rng)
    tensors[WORDS] = torch.tensor(values)
    with mock.patch.object(positions, "check"):
        tensors[packed] = encoding.add_checksum(encoding.pack(torch.tensor(found), NUMEL), tensors[WORDS])


SEALED: dict[str, Callable[..., Any]] = {
    "positions out of range": lambda p, v, i, rng: ([*p[:-1], NUMEL + rng.randrange(4)], v),
    "positions out of order": lambda p, v, i, rng: ([*p[:i], p[i + 1], p[i], *p[i + 2 :]], v),
    "a position twice": lambda p, v, i, rng: ([*p[: i + 1], p[i], *p[i + 2 :]], v),
    "a nonzero fewer than the config counts": lambda p, v, i, rng: (p[1:], v[1:]),
    "a nonzero more than the config counts": lambda p, v, i, rng: (
        sorted([*p, min({*range(NUMEL)} - {*p})]),
        [*v, 0.1],
    ),
    "a NaN among the values": lambda p, v, i, rng: (p, [*v[:i], math.nan, *v[i + 1 :]]),
    "an infinite value": lambda p, v, i, rng: (p, [*v[:i], math.inf, *v[i + 1 :]]),
}
"""Changes of positions p and values v of a parameter, at index i."""
REWRITTEN: dict[str, Callable[..., Any]] = {
    **{f"{kind}, sealed": lambda t, c, rng, f=change: rewrite_diff(t, rng, f) for kind, change in SEALED.items()},
    "a head NaN or infinite, sealed": spoil_head,
    "a tensor of an unknown parameter": lambda t, c, rng: t.update({WORDS.replace("weight", "new"): torch.ones(3)}),
    "a tensor of an unknown head": lambda t, c, rng: t.update({HEAD.replace("weight", "new"): torch.ones(3)}),
    "two layers' values swapped": lambda t, c, rng: swap(t, rng, VALUES),
    "two layers' values, positions and seals swapped": lambda t, c, rng: swap(t, rng, VALUES, POSITIONS),
    "two heads' tensors swapped": lambda t, c, rng: t.update({HEAD: t[POOLER], POOLER: t[HEAD]}),
    "a count in the config one off": lambda t, c, rng: recount(c["nnz_pattern"], rng),
    "a count in the config missing": lambda t, c, rng: c["nnz_pattern"].pop(rng.choice([*c["nnz_pattern"]])),
    "a count in the config too many": lambda t, c, rng: c["nnz_pattern"].update({"bert.embeddings.LayerNorm.bias": 1}),
    "a newer format_version": lambda t, c, rng: c.update(format_version=3),
}
"""Changes of the tensors t and of the config's fields c."""


def rewrite(files: Files, rng: random.Random, change: Callable[..., Any]) -> None:
    """Change the tensors and the fields of the config, and write both files."""
    tensors, fields = load(bytes(files[WEIGHTS])), json.loads(files[CONFIG])
    change(tensors, fields, rng)
    files[WEIGHTS] = bytearray(save(tensors, {"format": "pt"}))
    files[CONFIG] = bytearray(json.dumps(fields, indent=2).encode())


def damages(own: Files, twin: Files, other: Files) -> Iterator[tuple[str, Change]]:
    """Names and changes of all kinds of damage.

    `own` are the files to damage; `twin` is an adapter with the same heads and counts, `other` one with neither.
    """
    parts, start = regions(own[WEIGHTS]), own[CONFIG].index(b'"base_fingerprint"')
    stop = own[CONFIG].index(b"}", start)
    body, seals = range(len(parts["header"]), len(own[WEIGHTS])), parts["seals"][:: encoding.CHECKSUM_BYTES]
    tensors, theirs = load(bytes(own[WEIGHTS])), load(bytes(twin[WEIGHTS]))
    for region, own_bytes in parts.items():
        yield f"a bit of the {region}", lambda f, rng, b=own_bytes: flip(f[WEIGHTS], rng, b)
    yield "a bit of the config's fingerprint", lambda f, rng: flip(f[CONFIG], rng, range(start, stop))
    rest = [*range(start), *range(stop, len(own[CONFIG]))]
    yield "a bit of the config elsewhere", lambda f, rng: flip(f[CONFIG], rng, rest)
    yield "a bit of README.md", lambda f, rng: flip(f["README.md"], rng)
    yield "eight bits behind the header", lambda f, rng: flip(f[WEIGHTS], rng, body, 8)
    yield "zeros in the weights", lambda f, rng: zero(f[WEIGHTS], rng.choice(body), rng.randint(1, 256))
    yield "zeros from a seal on", lambda f, rng: zero(f[WEIGHTS], rng.choice(seals), rng.randint(4, 12))
    for name, label in ((WEIGHTS, "weights"), (CONFIG, "config")):
        yield f"{label} truncated", lambda f, rng, n=name: f.update({n: f[n][: rng.randrange(1, len(f[n]))]})
        yield f"{label} empty", lambda f, rng, n=name: f[n].clear()
        yield f"{label} missing", lambda f, rng, n=name: f.pop(n)
    for key in tensors:
        yield "a tensor missing", lambda f, rng, k=key: rewrite(f, rng, lambda t, c, rng: t.pop(k))
    for kind, change in REWRITTEN.items():
        yield kind, lambda f, rng, change=change: rewrite(f, rng, change)
    for key in (key for key in tensors if VALUES in key):
        yield (
            "another adapter's values",
            lambda f, rng, k=key: rewrite(f, rng, lambda t, c, rng: t.update({k: theirs[k]})),
        )
    yield "another adapter's weights", lambda f, rng: f.update({WEIGHTS: other[WEIGHTS]})
    yield "another's weights, same heads and counts", lambda f, rng: f.update({WEIGHTS: twin[WEIGHTS]})
    for kind in BASES:
        yield kind, lambda f, rng: None
