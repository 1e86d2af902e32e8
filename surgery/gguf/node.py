"""A GGUF file among the things that a user may name as an input."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import BF16, BY_NAME, DType
from surgery.checkpoint.files import check_links
from surgery.checkpoint.source import FileState, Source
from surgery.checkpoint.stored import Stored
from surgery.checkpoint.ties import declared_ties
from surgery.errors import Refused, did_you_mean
from surgery.gguf.beside import unpacked
from surgery.gguf.header import Header, Lying, Many, read_header
from surgery.gguf.names import FAMILIES, computed, named
from surgery.gguf.values import Packing, Unpacked
from surgery.graph.expr import Expr, Read
from surgery.graph.node import SourceNode

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf$")
_PLAIN = {0: "F32", 1: "F16", 30: "BF16", 28: "F64"}
_BYTES = BY_NAME["U8"]
_EXPERTS = 1 << 14  # more than any model has in a layer


class GgufNode(SourceNode):
    """The weights of a GGUF file, under transformers' names. Quantised ones stand for bfloat16; floats keep their type."""

    verb = "UNPACK"
    as_stored = False

    def __init__(
        self, source: Source, headers: list[Header], said: str | None, label: str | None, where: Mapping[str, str]
    ) -> None:
        super().__init__(source, label, where)
        self._metadata, self._lying = headers[0].metadata, [(h, t) for h in headers for t in h.tensors]
        self.kinds = sorted({_name(t.kind) for _, t in self._lying if t.kind not in _PLAIN})
        self.notes = [said] if said else []
        if any(computed(t.name) for _, t in self._lying):
            self.notes.append(
                "the file holds factors of its rotary frequencies, which transformers makes of `rope_scaling`: "
                "take config.json from the original model if the output's has none"
            )

    def _build(self) -> dict[str, Expr]:
        family = FAMILIES[self._metadata["general.architecture"]]
        made: dict[str, Expr] = {}
        for header, lying in self._lying:
            known = named(family, lying.name)
            if known is None:
                if not computed(lying.name):
                    raise self.refuse(
                        f"{header.path}: `{lying.name}` is not known of {self._metadata['general.architecture']} models",
                        hint="use the model that the file was made from",
                    )
                self.dropped[lying.name] = "factors of rotary frequencies: computed from the config"
                continue
            head = self._head(known.part, lying) if family.paired else 0
            shift = family.shifted if known.norm else 0.0
            shape = (1, *lying.shape) if known.part == "ffn_gate_inp_shexp" and len(lying.shape) == 1 else lying.shape
            if known.stacked:
                for i in range(shape[0]):
                    stored = self.source.tensors[f"{lying.name}[{i}]"]
                    made[known.name.format(i)] = self._expr(stored, shape[1:], lying.kind, head, shift)
            else:
                made[known.name] = self._expr(self.source.tensors[lying.name], shape, lying.kind, head, shift)
        return made

    def _expr(self, stored: Stored, shape: tuple[int, ...], kind: int, head: int, shift: float) -> Expr:
        read = Read(self.source, stored, self)
        plain = kind in _PLAIN
        if plain and not head and not shift and shape == stored.shape:
            return read
        dtype = stored.dtype if plain else BF16
        return Unpacked(read, shape, dtype, self, packing=None if plain else packing(kind), head=head, shift=shift)

    def _head(self, part: str, lying: Lying) -> int:
        """Rows of a head, of queries and keys."""
        if part not in ("attn_q", "attn_k"):
            return 0
        arch = self._metadata["general.architecture"]
        count = self._metadata.get(f"{arch}.attention.head_count")
        if part == "attn_k":
            count = self._metadata.get(f"{arch}.attention.head_count_kv", count)
        if not isinstance(count, int) or count < 1 or lying.shape[0] % count or lying.shape[0] // count % 2:
            raise self.refuse(
                f"`{lying.name}` has {lying.shape[0]} rows, which its metadata's {count} heads do not divide into even halves",
                hint="use the model that the file was made from",
            )
        return lying.shape[0] // count

    @cached_property
    def ties(self) -> dict[str, str]:
        return declared_ties(list(self.tensors), self.config)

    def outline(self) -> Source:
        """The same checkpoint as a source whose tensors have these names and shapes; their bytes are not in it."""
        of, tensors = self.source, {}
        for name, expr in self.tensors.items():
            read = expr if isinstance(expr, Read) else expr.args[0]
            assert isinstance(read, Read)
            tensors[name] = Stored(name, expr.dtype, expr.shape, read.stored.path, read.stored.offset)
        return Source(of.location, of.label, of.directory, tensors, of.files, of.fingerprint)

    @property
    def text(self) -> str:
        return f"{self.label} (GGUF" + (f", {', '.join(self.kinds)})" if self.kinds else ")")


def gguf_file(location: str, label: str | None, where: Mapping[str, str]) -> GgufNode | None:
    """The kind of `surgery.inputs`: a .gguf file (any one of a split model), or a folder with nothing but one model's."""
    path = Path(os.path.expanduser(location))
    if path.suffix != ".gguf":
        found = sorted(path.glob("*.gguf")) if path.is_dir() else []
        if not found or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            return None
        if len({_SPLIT.sub(r"\1", f.name) for f in found}) > 1:
            raise Refused(f"{path}: holds {len(found)} GGUF files", hint=f"name one: {', '.join(map(str, found[:3]))}")
        path = found[0]
    if not path.is_file():
        return None
    check_links(path.parent)
    headers = [read_header(p) for p in _parts(path)]
    return _opened(location, headers, label or path.stem, where)


def _parts(path: Path) -> list[Path]:
    split = _SPLIT.match(path.name)
    if split is None:
        return [path]
    stem, _, count = split.groups()
    parts = [path.with_name(f"{stem}-{i + 1:05d}-of-{count}.gguf") for i in range(int(count))]
    if path not in parts:
        raise Refused(f"{path}: by its name a part of {int(count)}, and none of them", hint="give it the name that it had")
    missing = next((p for p in parts if not p.is_file()), None)
    if missing is not None:
        raise Refused(f"{missing}: missing; {path.name} is one of {int(count)}", hint="the download is not complete")
    return parts


def _opened(location: str, headers: list[Header], label: str, where: Mapping[str, str]) -> GgufNode:
    first = headers[0]
    arch = first.metadata.get("general.architecture")
    if arch not in FAMILIES:
        raise Refused(
            f"{first.path}: a GGUF file of the architecture {arch}; how its weights were permuted is not known here",
            hint=did_you_mean(str(arch), FAMILIES) or f"known: {', '.join(FAMILIES)}; else use the model it was made from",
        )
    if arch == "llama" and first.metadata.get("llama.expert_count"):
        raise Refused(f"{first.path}: a GGUF file of a mixture of llama experts", hint="use the model it was made from")
    if any(isinstance(first.metadata.get(f"{arch}.attention.{key}"), Many) for key in ("head_count", "head_count_kv")):
        hint = "use the model it was made from"
        raise Refused(f"{first.path}: gives every block its own number of heads, which is not known here", hint=hint)
    tensors: dict[str, Stored] = {}
    for header in headers:
        for lying in header.tensors:
            known = named(FAMILIES[arch], lying.name)
            for stored in _stored(header, lying, known is not None and known.stacked):
                if stored.name in tensors:
                    raise Refused(f"{header.path}: `{lying.name}` is also in {tensors[stored.name].path}")
                tensors[stored.name] = stored
    kept = next((t.dtype for t in tensors.values() if t.dtype.size == 2), None)
    dtype = BF16 if any(t.dtype is _BYTES for t in tensors.values()) else kept or BY_NAME["F32"]
    state = FileState.of(first.path)
    folder, said = unpacked(first.path.resolve(), state.size, state.mtime_ns, dtype.torch, _shown(headers, arch))
    digest = hashlib.sha256("".join(f"{h.digest}{h.size}" for h in headers).encode()).hexdigest()
    files = {str(h.path): FileState.of(h.path) for h in headers}
    return GgufNode(Source(location, label, folder, tensors, files, digest), headers, said, label, where)


def _shown(headers: list[Header], arch: str) -> tuple[tuple[str, int], ...]:
    """What a config says, as the tensors show it: transformers takes not all of it from the metadata, and looks at one part of
    a split file alone."""
    shapes = {t.name: t.shape for h in headers for t in h.tensors}
    sizes = {
        "vocab_size": shapes.get("token_embd.weight", ())[:1],
        "num_experts": shapes.get("blk.0.ffn_gate_exps.weight", ())[:1],
        "moe_intermediate_size": shapes.get("blk.0.ffn_gate_exps.weight", ())[1:2],
        "shared_expert_intermediate_size": shapes.get("blk.0.ffn_gate_shexp.weight", ())[:1],
    }
    head = headers[0].metadata.get(f"{arch}.attention.key_length")
    known = {key: size[0] for key, size in sizes.items() if size} | ({"head_dim": head} if isinstance(head, int) else {})
    return (("tie_word_embeddings", "output.weight" not in shapes), *known.items())


def _stored(header: Header, lying: Lying, stacked: bool) -> list[Stored]:
    """Where its bytes lie: of stacked experts, each one's. Raises Refused where that is not in the file."""
    path, (name, shape, kind, offset) = str(header.path), lying
    dtype: DType
    if kind in _PLAIN:
        dtype = BY_NAME[_PLAIN[kind]]
        size = prod(shape) * dtype.size
    else:
        try:
            dtype, (_, elements, nbytes) = _BYTES, packing(kind)
        except Refused as problem:
            raise Refused(f"{path}: `{name}`: {problem.message}", hint=problem.hint) from None
        if shape[-1] % elements:
            raise Refused(f"{path}: `{name}` has rows of {shape[-1]} elements; {_name(kind)} has blocks of {elements}")
        size = prod(shape) // elements * nbytes
    if offset + size > header.size:
        raise Refused(
            f"{path}: `{name}` ends at byte {offset + size:,}; the file has {header.size:,}",
            hint="the download is not complete",
        )
    if not stacked:
        return [Stored(name, dtype, shape if kind in _PLAIN else (size,), path, offset)]
    if len(shape) != 3 or not size or shape[0] > _EXPERTS:
        raise Refused(f"{path}: `{name}` has shape {list(shape)}, which is not that of stacked experts")
    each = size // shape[0]
    inner = shape[1:] if kind in _PLAIN else (each,)
    return [Stored(f"{name}[{i}]", dtype, inner, path, offset + i * each) for i in range(shape[0])]


@cache
def packing(kind: int) -> Packing:
    """How a quantised type packs its elements. Raises Refused for one that the gguf package cannot unpack, or without it."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError:
        hint = "pip install 'weight-surgery[gguf]'"
        raise Refused("quantised GGUF tensors need the package gguf", hint=hint) from None
    try:
        elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        dequantize(np.zeros((1, nbytes), np.uint8), GGMLQuantizationType(kind))
    except (ValueError, KeyError, NotImplementedError):
        raise Refused(f"its type {_name(kind)} cannot be unpacked", hint="use the model it was made from") from None
    return Packing(kind, elements, nbytes)


def _name(kind: int) -> Any:
    try:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(kind).name
    except (ImportError, ValueError):
        return f"number {kind}"
