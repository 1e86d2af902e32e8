"""What `fuzz.py` calls: one function per parser, which makes its files in `folder` and gives (what to call, seeds).

Parsers of text get it from memory where they can, and from a file now and then; the whole way is a target of its own.
Nothing here imports torch but `pickled`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

Target = Callable[[bytes], None]


def header(folder: Path) -> tuple[Target, list[bytes]]:
    """The JSON header of a safetensors file."""
    from surgery.checkpoint.header import parse_header, read_header

    path = folder / "model.safetensors"

    def call(data: bytes) -> None:
        try:
            parse_header(data, 8 + len(data) + 8, str(path))
        finally:
            if len(data) % 64 == 0:  # now and then by way of a file, with the length that it says itself
                path.write_bytes(data)
                read_header(str(path))

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    seeds = [
        {"x": entry},
        {"__metadata__": {"format": "pt"}, "x": entry},
        {"a.b": {**entry, "shape": [1, 1, 2]}, "b": {**entry, "data_offsets": [8, 8], "shape": [0]}},
    ]
    raw = [json.dumps(s).encode() for s in seeds]
    return call, [*raw, *(struct.pack("<Q", len(r)) + r + b"\0" * 8 for r in raw)]


def index(folder: Path) -> tuple[Target, list[bytes]]:
    """An index of shards, against what the shards hold."""
    from surgery.checkpoint.files import parse_index
    from surgery.checkpoint.source import _check_index, open_source

    names = ("model-1.safetensors", "model-2.safetensors")
    for i, name in enumerate(names):
        raw = json.dumps({f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 4)
    place = folder / "model.safetensors.index.json"
    said = {"metadata": {"total_size": 8}, "weight_map": {f"t{i}": n for i, n in enumerate(names)}}
    place.write_text(json.dumps(said))
    found = open_source(str(folder)).tensors

    def call(data: bytes) -> None:
        if len(data) % 64 == 0:
            place.write_bytes(data)
            open_source(str(folder))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = ""  # as files that cannot be read are taken
        _, wanted = parse_index(text, str(place))
        _check_index(str(folder), wanted, found)

    return call, [json.dumps(said).encode(), b"{}"]


def document(folder: Path) -> tuple[Target, list[bytes]]:
    """YAML with positions, as recipes of both kinds are read; and the same text as a value of --set."""
    from surgery.recipe.document import Document, parse_override
    from surgery.recipe.mergekit.documents import read_documents

    path = folder / "recipe.yaml"

    def call(data: bytes) -> None:
        path.write_bytes(data)
        if len(data) % 2:
            Document(path)
        elif len(data) % 4:
            read_documents(path)
        else:
            parse_override(data.decode("utf-8", "replace"))

    _, seeds = recipe(folder)
    return call, [*seeds, b"a.b=[1, {c: 2}]", b"---\na: &x [1]\nb: *x\n---\nc: !!int 3\n"]


def _models(folder: Path) -> None:
    for name in ("base", "a"):
        (folder / name).mkdir(exist_ok=True)
        shapes = {"model.embed_tokens.weight": [3, 2], "model.norm.weight": [2]}
        shapes |= {f"model.layers.{i}.w.weight": [2, 2] for i in range(2)}
        entries, at = {}, 0
        for tensor, shape in shapes.items():
            end = at + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            entries[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
            at = end
        raw = json.dumps(entries).encode()
        (folder / name / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * at)


def recipe(folder: Path) -> tuple[Target, list[bytes]]:
    """A recipe of either dialect, up to the plan."""
    from surgery.engine.plan import make_plan
    from surgery.recipe.native import read_recipe

    _models(folder)
    path = folder / "recipe.yaml"

    def call(data: bytes) -> None:
        path.write_bytes(data)
        read = read_recipe(path, {})
        make_plan(read.node, read.settings)

    return call, [
        b"models: {base: base, a: a}\nsteps:\n  d: {op: diff, of: [a, base]}\n  out: {op: add, of: [base, d], weight: 0.5}\n"
        b"output: {from: out, dtype: bfloat16}\n",
        b"models: {base: base, a: {source: a}}\nsteps:\n"
        b"  m: {op: average, of: [base, a], weight: {'*norm*': 1, '*': [0.3, 0.6]}}\noutput: {from: m}\n",
        b"merge_method: slerp\nbase_model: base\nmodels: [{model: base}, {model: a}]\n"
        b"parameters: {t: [0, 0.5, 1]}\ndtype: float32\n",
        b"merge_method: ties\nbase_model: base\nslices:\n  - sources:\n"
        b"    - {model: a, layer_range: [0, 2], parameters: {density: 0.5, weight: 1}}\n"
        b"    - {model: base, layer_range: [0, 2]}\n",
        b"merge_method: passthrough\nslices:\n - sources: [{model: a, layer_range: [0, 1]}]\n"
        b" - sources: [{model: base, layer_range: [1, 2]}]\n",
    ]  # fmt: skip


def _package(folder: Path) -> tuple[bytes, bytes, int, int]:
    """A package of one changed tensor: (whole, its manifest, where the parts begin, where the manifest does)."""
    import numpy as np

    from surgery.delta.codecs.stream import unpack_text
    from surgery.delta.pack import pack
    from surgery.inputs import open_node

    _models(folder)
    weights = folder / "a" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-40] + np.arange(10, dtype=np.float32).tobytes())
    seed = folder / "seed.delta.safetensors"
    pack(open_node(str(folder / "base")), open_node(str(folder / "a")), seed, threads=1)
    whole = seed.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    said = json.loads(whole[8:start])
    begin, end = said["delta/manifest"]["data_offsets"]
    manifest = unpack_text(whole[start + begin : start + end], int(said["__metadata__"]["delta.manifest.size"]))
    return whole, manifest, start, start + begin


def manifest(folder: Path) -> tuple[Target, list[bytes]]:
    """The manifest of a delta package, as text."""
    from surgery.delta.manifest import read_manifest

    _, text, _, _ = _package(folder)

    def call(data: bytes) -> None:
        read_manifest(data, "fuzzed")

    return call, [text]


def package(folder: Path) -> tuple[Target, list[bytes]]:
    """A manifest with its header made to fit, so that what is fuzzed is what comes after the hashes; or a whole package."""
    from surgery.delta.codecs.stream import pack_text
    from surgery.delta.container import Package
    from surgery.delta.manifest import read_manifest
    from surgery.delta.shards import header_of

    whole, text, start, begin = _package(folder)
    path = folder / "fuzzed.delta.safetensors"

    def call(data: bytes) -> None:
        if data[:1] == b"{":
            try:
                found = json.loads(data)
                packed = pack_text(data)
                first = header_of(found, packed, len(data), start)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                read_manifest(data, str(path))
                return
            path.write_bytes(first + whole[start:begin] + packed)
        else:
            path.write_bytes(data)
        Package(str(path))

    return call, [text, whole]


def pickled(folder: Path) -> tuple[Target, list[bytes]]:
    """A torch archive."""
    import torch

    from surgery.checkpoint.pickled import read_pickled

    path = folder / "m.bin"

    def call(data: bytes) -> None:
        path.write_bytes(data)
        read_pickled(str(path))

    seeds = []
    for value in ({"x": torch.ones(2)}, {"state_dict": {"x": torch.ones(4, 2).T, "y": torch.ones(3, dtype=torch.int8)}}):
        torch.save(value, path)
        seeds.append(path.read_bytes())
    return call, seeds


TARGETS = {f.__name__: f for f in (header, index, document, recipe, manifest, package, pickled)}
