"""Reading tensors as bytes, and output folders that appear whole or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.checkpoint.layout import Entry, lay_out
from surgery.checkpoint.sidecar import copy_sidecars, write_json
from surgery.checkpoint.source import Source
from surgery.checkpoint.stored import Stored
from surgery.checkpoint.writer import Writer
from surgery.delta.places import places
from surgery.engine import convert
from surgery.engine.output import Output
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.expr import Expr
from surgery.graph.node import Node

Array = NDArray[Any]


Model = Source | Node  # a checkpoint on disk, or one that is computed: a package on its base, a merge


class Values:
    """Whole tensors of a model, by name. Use as a context.

    tensors: name -> type and shape. label: its name in messages. config: its config.json. identity: its headers' fingerprint.
    """

    def __init__(self, model: Model) -> None:
        self.tensors: Mapping[str, Stored | Entry]
        self._node = model if isinstance(model, Node) else None
        if isinstance(model, Node):
            self.tensors = {n: Entry(n, e.dtype, e.shape) for n, e in model.tensors.items()}
            self.identity, self.label = model.token, model.label or "the model"
            self.location = self.label
            self._reader = Reader({})
        else:
            self.tensors, self.identity, self.label = model.tensors, model.fingerprint, model.label
            self.location = model.location
            self._reader = Reader(model.files)
        self.config = model.config

    def bytes(self, name: str) -> Array:
        """The tensor's bytes (uint8), row-major."""
        if self._node is not None:
            return _computed(self._node.tensors[name])
        stored = self.tensors[name]
        assert isinstance(stored, Stored)
        out = np.empty(stored.nbytes, np.uint8)
        if stored.nbytes:
            self._reader.read(stored, 0, stored.numel, out)
        return out

    def floats(self, name: str) -> Array:
        """The tensor in float32 (float64 rounded), in its shape."""
        stored = self.tensors[name]
        return convert.typed(self.bytes(name), stored.dtype).astype(np.float32).reshape(stored.shape)

    def __enter__(self) -> Values:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def _computed(expr: Expr) -> Array:
    from surgery.engine.compute import compute

    made = compute(expr).contiguous().reshape(-1)
    import torch

    return np.asarray(made.view(torch.uint8).numpy()) if made.numel() else np.empty(0, np.uint8)


class Change(NamedTuple):
    name: str
    stored: Stored | Entry  # in the target
    base: Array  # bytes
    target: Array


def changes(base: Values, target: Values, what: str) -> Iterator[Change]:
    """Tensors whose bytes differ, in the target's order, one at a time. Raises Refused unless names, shapes and types agree.

    what: the format that cannot say more than "changed".
    """
    check_same_tensors(base, target, what)
    for name, stored in target.tensors.items():
        old, new = base.bytes(name), target.bytes(name)
        if not np.array_equal(old, new):
            yield Change(name, stored, old, new)


def check_same_tensors(base: Values, target: Values, what: str) -> None:
    """Raises Refused unless both have the same names, shapes and types."""
    for name in base.tensors.keys() ^ target.tensors.keys():
        where = "is new" if name in target.tensors else "was dropped"
        raise Refused(f"{target.label}: `{name}` {where}; {what} cannot say so", hint="use a delta package")
    for name, stored in target.tensors.items():
        old = base.tensors[name]
        if (old.shape, old.dtype) != (stored.shape, stored.dtype):
            raise Refused(
                f"{target.label}: `{name}` is {stored.dtype} {list(stored.shape)}, the base has {old.dtype} {list(old.shape)}; "
                f"{what} cannot say so",
                hint="use a delta package",
            )


@contextmanager
def appearing(out: str | Path, models: Iterable[Model], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; renamed to `out` when the block ends well, removed otherwise. models: what is read meanwhile.

    overwrite: what is at `out` is replaced. Raises Refused if it is not to be, and if it is or holds a model.
    """
    target = Output(Path(out), [p for m in models for p in places(m)], resume=False, overwrite=overwrite)
    target.claim("", resume=False)
    try:
        yield target.directory
        target.publish()
    except BaseException:
        target.abandon()
        raise


class Shards:
    """Small safetensors files written one after the other, each when `limit` bytes have gathered."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._waiting: list[tuple[str, str, Sequence[int], bytes, str | None]] = []
        self._files: list[tuple[Path, list[str]]] = []
        self._filled = 0

    def add(self, name: str, dtype: str, shape: Sequence[int], data: bytes, note: str | None = None) -> None:
        """note: a string for the file's metadata under the tensor's name."""
        self._waiting.append((name, dtype, shape, data, note))
        self._filled += len(data)
        if self._filled >= self._limit:
            self._flush()

    def _flush(self) -> None:
        path = self._folder / f"part-{len(self._files)}"
        notes = {n: note for n, *_, note in self._waiting if note is not None}
        write_safetensors(path, [(n, d, s, data) for n, d, s, data, _ in self._waiting], notes)
        self._files.append((path, [w[0] for w in self._waiting]))
        self._waiting, self._filled = [], 0

    def close(self, first: int) -> dict[str, str]:
        """Give the files their names, `model-NNNNN-of-TTTTT.safetensors` counted from `first`; tensor -> file name."""
        if self._waiting:
            self._flush()
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._files):
            file = f"model-{i + first:05}-of-{len(self._files):05}.safetensors"
            path.rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        return weight_map


def write_safetensors(path: Path, tensors: Sequence[tuple[str, str, Sequence[int], Any]], metadata: Mapping[str, str]) -> None:
    """One safetensors file: (name, type, shape, bytes) in order. `__metadata__` is left out where it is empty."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for *_, data in tensors:
            file.write(data)


def write_checkpoint(folder: Path, donor: Source, made: Iterator[tuple[str, Any]], shard_size: int = 5 * 10**9) -> None:
    """A checkpoint with the tensors of `donor` (names, types, shapes, config, tokenizer) and new bytes for each, one by one."""
    entries = [Entry(name, stored.dtype, stored.shape) for name, stored in donor.tensors.items()]
    layout = lay_out(entries, shard_size)
    writer = Writer(folder, layout, fresh=True)
    try:
        for name, data in made:
            if len(data):
                writer.write(name, 0, data)
    finally:
        writer.close()
    index = layout.index()
    if index is not None:
        write_json(folder / "model.safetensors.index.json", index)
    copy_sidecars(donor, donor, folder)
    if donor.config is not None:
        write_json(folder / "config.json", donor.config)


def rebuild(model: Model, base: Source, out: str | Path) -> None:
    """Write a model that has `base`'s names, shapes and types as a new folder. Raises Refused if it has others."""
    with Values(base) as below, Values(model) as made, appearing(out, (model, base)) as room:
        check_same_tensors(below, made, "a rebuilt base")
        write_checkpoint(room, base, ((name, made.bytes(name)) for name in base.tensors))


def rounded(values: Array, dtype: DType) -> Array:
    """Floats as bytes of `dtype`, rounded to nearest even."""
    out = np.empty(values.size * dtype.size, np.uint8)
    convert.encode(values.reshape(-1), dtype, out)
    return out
