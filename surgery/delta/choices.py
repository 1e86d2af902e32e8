"""Which tensors of a lossy package are coded how."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from surgery.delta import lossy  # noqa: F401  registers the codecs
from surgery.delta.codecs.base import check_options, lossy_codec
from surgery.delta.codecs.exact import ULP, Exact
from surgery.delta.lossy.common import rows_of
from surgery.delta.pack import Choose, pack
from surgery.delta.rebuild import stored_tensors
from surgery.delta.reference import Array
from surgery.errors import Refused
from surgery.graph.edit import SelectNode
from surgery.graph.node import Node
from surgery.graph.values import matches

_LISTED = 600  # bytes that the header takes for a tensor's parts, beside what `allocate` sets aside for the manifest
DEFAULT = "dither"  # what codes where no codec is named


def fixed(model: Node, codec: str, options: Mapping[str, Any], only: Sequence[str]) -> Choose:
    """One codec with the same options for every chosen tensor. Raises Refused for what the codec does not take."""
    found = lossy_codec(codec)
    complete = check_options(found, options)
    chosen = _chosen(model, only)
    return lambda tensor: (found, complete) if tensor.name in chosen else None


def automatic(
    base: Node,
    model: Node,
    *,
    only: Sequence[str],
    bits: float | None = None,
    size: int | None = None,
    max_error: float | None = None,
    weights: Callable[[set[str]], Mapping[str, float]] | None = None,
    exact: Exact = ULP,
) -> Choose:
    """One budget spent over all chosen tensors. Deltas are read once, one tensor at a time.

    size: bytes of the whole package, what is carried exactly (by the codec `exact`) with it. Raises Refused where that alone
    takes more.
    weights: names -> factors on tensors' squared errors, from what is known of their inputs; codes are fitted to those then.
    """
    from surgery.delta.deltas import Deltas
    from surgery.delta.lossy.auto import allocate

    chosen = _chosen(model, only)
    if size is not None:
        size -= _carried(base, model, chosen, size, exact) + _LISTED * len(chosen)
    with Deltas(base, model) as deltas:
        providers: dict[str, Callable[[], Array]] = {n: partial(deltas.delta, n) for n in deltas if n in chosen}
        factors = None if weights is None else weights(set(providers))
        found = allocate(providers, bits=bits, size=size, max_error=max_error, weights=factors)
    table = {name: (lossy_codec(c.codec), dict(c.options)) for name, c in found.choices.items() if c.codec is not None}
    table = {name: (codec, check_options(codec, options)) for name, (codec, options) in table.items()}
    return lambda tensor: table.get(tensor.name)


def _carried(base: Node, model: Node, chosen: set[str], size: int, exact: Exact) -> int:
    """Bytes of a package of everything but the tensors `chosen`: made, and thrown away. Raises Refused above `size`."""
    rest = [name for name in stored_tensors(model) if name not in chosen]
    if not rest:
        return 0
    with tempfile.TemporaryDirectory(prefix="surgery-") as room:
        held = pack(base, SelectNode(model, rest), Path(room) / "rest.delta.safetensors", codec=exact).size
    if held >= size:
        raise Refused(
            f"--size {size}: the {len(rest)} tensors that are carried exactly take {held} bytes",
            hint='`--only "*"` codes them with losses too; or give more',
        )
    return held


FIRST = ("svd_wf", 0.5)  # a layer before exact ones that makes many fine-tunes smaller, and its bits per weight


def low_rank(model: Node, most: int) -> Choose:
    """A low-rank first layer for every matrix that it can be taken of in `most` bytes."""
    codec = lossy_codec(FIRST[0])
    options = check_options(codec, {"bits": FIRST[1]})
    need: Callable[..., int] = codec.room  # type: ignore[attr-defined]
    chosen = {
        name
        for name, e in stored_tensors(model).items()
        if e.dtype.is_float and len(e.shape) >= 2 and min(rows_of(e.shape)) >= 64 and need(e.shape, **options) <= most
    }
    return lambda tensor: (codec, options) if tensor.name in chosen else None


def _chosen(model: Node, only: Sequence[str]) -> set[str]:
    """Float tensors that match a glob of `only`; without any, the matrices inside blocks. Raises Refused for a glob without
    match."""
    tensors: Mapping[str, Any] = stored_tensors(model)
    floats = [name for name, e in tensors.items() if e.dtype.is_float]
    for glob in only:
        if not any(matches(glob, name) for name in floats):
            raise Refused(f"--only {glob}: matches no float tensor of the model")
    if only:
        return {name for name in floats if any(matches(glob, name) for glob in only)}
    inside = {n for n in floats if len(tensors[n].shape) >= 2 and model.structure.block(n) is not None}
    return inside or {n for n in floats if len(tensors[n].shape) >= 2}
