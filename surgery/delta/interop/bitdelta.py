"""BitDelta's `diff.pt`: sign masks with one scale each, and what else was trained, in full.

A pickle of `{module.mask: int32 (inputs / 32, outputs), module.coeff: float32, parameter: tensor}`: bit j of word k is the
sign of input 32 k + j (1 for >= 0), stored transposed. W = base + coeff * sign. Other entries are whole parameters. It is
read with `weights_only=True`, so nothing in it is run. The file says nothing about its base: only shapes can be checked.

Facts from FasterDecoding/BitDelta (bitdelta/diff.py, binary_gemm_kernel.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from surgery.checkpoint.pickled import check_archive
from surgery.checkpoint.source import Source
from surgery.delta.codecs.base import Coded
from surgery.delta.interop.files import Array, Values, appearing, rounded, write_checkpoint
from surgery.delta.lossy.sign import Sign
from surgery.errors import Refused


class BitDelta(NamedTuple):
    """coded: tensor name -> delta as `sign/1` codes it. whole: tensor name -> the new values in float32, in full."""

    coded: dict[str, Coded]
    whole: dict[str, Array]


def read_bitdelta(path: str | Path, base: Source) -> BitDelta:
    """Read a diff and match it with the base's tensors. Raises Refused for what does not fit, and for pickles that run code."""
    import torch

    check_archive(str(path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises half a dozen types; every one means the same here
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        hint = "only plain tensors are loaded from pickles"
        raise Refused(f"{path}: refused to unpickle: {reason[:200]}", hint=hint) from None
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise Refused(f"{path}: holds no map of tensors", hint="expected BitDelta's diff.pt")
    coded, whole = {}, {}
    for name, value in loaded.items():
        if name.endswith(".mask"):
            module = name.removesuffix(".mask")
            scale = loaded.get(module + ".coeff")
            if scale is None or scale.numel() != 1 or not bool(torch.isfinite(scale.float()).all()):
                raise Refused(f"{path}: `{module}` has a mask but no finite scale")
            coded[module + ".weight"] = _coded(path, module + ".weight", value, float(scale), base)
        elif not name.endswith(".coeff"):
            whole[name] = _whole(path, name, value, base)
    if not coded:
        raise Refused(f"{path}: has no sign masks", hint="expected BitDelta's diff.pt")
    return BitDelta(coded, {n: v for n, v in whole.items() if n not in coded})


def _coded(path: str | Path, name: str, mask: Any, scale: float, base: Source) -> Coded:
    stored = base.tensors.get(name)
    if stored is None or len(stored.shape) != 2:
        raise Refused(f"{path}: changes `{name}`, which is no matrix of {base.label}", hint="this is not its base")
    rows, columns = stored.shape
    words = mask.numpy()
    if words.dtype != np.int32 or words.shape != (columns // 32, rows) or columns % 32:
        found, wanted = f"{words.dtype} {list(words.shape)}", f"int32 [{columns // 32}, {rows}]"
        raise Refused(f"{path}: mask of `{name}` is {found}; a matrix {rows} x {columns} needs {wanted}")
    bits = np.unpackbits(np.ascontiguousarray(words.T).astype("<i4").view(np.uint8), bitorder="little")  # row-major
    parts = {"signs": np.packbits(bits, bitorder="little").tobytes(), "scales": np.array([scale], "<f4").tobytes()}
    return Coded(parts, {"per": "tensor", "bits": 8.0 * sum(map(len, parts.values())) / (rows * columns)})


def _whole(path: str | Path, name: str, value: Any, base: Source) -> Array:
    stored = base.tensors.get(name)
    if stored is None or tuple(value.shape) != stored.shape or not value.dtype.is_floating_point:
        shape = list(value.shape)
        raise Refused(f"{path}: `{name}` of shape {shape} is no tensor of {base.label}", hint="this is not its base")
    return np.asarray(value.float().numpy())


def import_bitdelta(base: Source, diff: str | Path, out: str | Path) -> dict[str, int]:
    """Apply a diff to `base` and write the checkpoint as a new folder: base + delta in float32, rounded once to its type.

    Raises Refused before anything is written.
    """
    found = read_bitdelta(diff, base)
    with Values(base) as values, appearing(out, (base,)) as room:
        write_checkpoint(room, base, _made(values, found))
    unchanged = len(base.tensors) - len(found.coded) - len(found.whole)
    return {"signs": len(found.coded), "whole": len(found.whole), "unchanged": unchanged}


def _made(values: Values, found: BitDelta) -> Iterator[tuple[str, Array]]:
    sign = Sign()
    for name, stored in values.tensors.items():
        if name in found.coded:
            delta = sign.decode(found.coded[name], stored.shape, name, 0, prod(stored.shape))
            yield name, rounded(values.floats(name).reshape(-1) + delta, stored.dtype)
        elif name in found.whole:
            yield name, rounded(found.whole[name], stored.dtype)
        else:
            yield name, values.bytes(name)
