"""Patches for vLLM's checkpoint patch loader: which elements of which tensors have which new values.

vLLM (since August 2026) takes `CheckpointWeightPatch(name, shape, dtype, values, indices)` in checkpoint coordinates:
`indices` are flat positions in the full tensor, None replaces it whole. It marks unchanged elements by NaN while it loads, so
a changed element must not be NaN itself, and sparse patches are for float tensors. It applies in place and verifies
nothing: an export target, not a way to distribute.

On disk: `patch.safetensors` with `N.values` (flat, in the tensor's type) and `N.indices` (int32, or int64 for tensors beyond
its range; not there for a whole replacement), and `patch.json` with name, shape and dtype of every N. `load_vllm_patches` gives
the tuples:

    patches = [CheckpointWeightPatch(*p) for p in load_vllm_patches(folder)]
    load_checkpoint_weight_patches(model, patches)
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import BY_NAME, DType
from surgery.checkpoint.header import read_header
from surgery.checkpoint.layout import Entry
from surgery.checkpoint.sidecar import write_json
from surgery.checkpoint.source import FileState, read_json
from surgery.checkpoint.stored import Stored
from surgery.delta.interop.files import Array, Model, Values, appearing, changes, write_safetensors
from surgery.engine import convert
from surgery.engine.reader import Reader
from surgery.errors import Refused

FORMAT = "vllm-checkpoint-patch/1"


def export_vllm_patch(base: Model, target: Model, out: str | Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write the patches that lead from `base` to `target` as a new folder. Returns counts of patches, elements and bytes.

    Elements count as changed where their bits differ. A tensor is replaced whole where that is smaller, and where it is not
    Elements count as changed where their bits differ. A tensor is replaced whole where that is smaller, or where it is not
    retyped.
    """
    made: list[tuple[str, str, list[int], bytes]] = []
    listed: list[dict[str, Any]] = []
    with appearing(out, (base, target), overwrite=overwrite) as room, Values(base) as old, Values(target) as new:
        for change in changes(old, new, "a vLLM patch"):
            stored, size = change.stored, change.stored.dtype.size
            at = np.flatnonzero((change.base != change.target).reshape(-1, size).any(axis=1))
            count = prod(stored.shape)
            wide = count > 2**31 - 1
            number = len(listed)
            if stored.dtype.is_float and len(at) * (size + (8 if wide else 4)) < stored.nbytes:
                values = change.target.reshape(-1, size)[at].reshape(-1)
                _check_nan(new, stored, values, at)
                made.append((f"{number}.values", stored.dtype.name, [len(at)], values.tobytes()))
                index = at.astype("<i8" if wide else "<i4")
                made.append((f"{number}.indices", "I64" if wide else "I32", [len(at)], index.tobytes()))
            else:
                made.append((f"{number}.values", stored.dtype.name, [count], change.target.tobytes()))
            listed.append({"name": change.name, "shape": list(stored.shape), "dtype": stored.dtype.torch})
        made.sort(key=lambda m: -BY_NAME[m[1]].size)  # so that every tensor is aligned
        write_safetensors(room / "patch.safetensors", made, {})
        write_json(room / "patch.json", {"format": FORMAT, "base": old.identity, "tensors": listed})
    elements = sum(m[2][0] for m in made if m[0].endswith(".values"))
    return {"patches": len(listed), "elements": elements, "nbytes": sum(len(m[3]) for m in made)}


def _check_nan(target: Values, stored: Stored | Entry, values: Array, at: Array) -> None:
    bad = np.flatnonzero(np.isnan(_floats(values, stored.dtype)))
    if bad.size:
        raise Refused(
            f"{target.label}: `{stored.name}` changes to NaN at element {at[bad[0]]}; vLLM takes NaN for unchanged",
            hint="use a delta package",
        )


def _floats(raw: Array, dtype: DType) -> Array:
    return convert.typed(np.ascontiguousarray(raw), dtype).astype(np.float64)


def load_vllm_patches(folder: str | Path) -> Iterator[tuple[str, tuple[int, ...], Any, Any, Any]]:
    """(name, shape, torch dtype, values, indices or None) of every patch, as torch tensors. Raises Refused for damage."""
    import torch

    folder = Path(folder)
    path = str(folder / "patch.safetensors")
    listed = read_json(folder / "patch.json")
    if listed is None or listed.get("format") != FORMAT or not isinstance(listed.get("tensors"), list):
        raise Refused(f"{folder}: not a vLLM patch ({FORMAT})")
    tensors = read_header(path).tensors
    reader = Reader({path: FileState.of(path)})
    try:
        for i, entry in enumerate(listed["tensors"]):
            name, shape, kind = _entry(folder, entry)
            values = tensors.get(f"{i}.values")
            if values is None or values.dtype.torch != kind:
                raise Refused(f"{folder}: `{name}` has no values of type {kind}")
            got = [_tensor(reader, tensors[n]) if n in tensors else None for n in (f"{i}.values", f"{i}.indices")]
            yield name, shape, getattr(torch, kind), got[0], got[1]
    finally:
        reader.close()


def _entry(folder: Path, entry: Any) -> tuple[str, tuple[int, ...], str]:
    try:
        return str(entry["name"]), tuple(int(n) for n in entry["shape"]), str(entry["dtype"])
    except (TypeError, KeyError, ValueError):
        raise Refused(f"{folder}: an entry of patch.json has no name, shape and dtype") from None


def _tensor(reader: Reader, stored: Stored) -> Any:
    import torch

    raw = np.empty(stored.nbytes, np.uint8)
    if stored.nbytes:
        reader.read(stored, 0, stored.numel, raw)
    return torch.from_numpy(raw).view(getattr(torch, stored.dtype.torch))
