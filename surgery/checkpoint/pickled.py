"""Headers of `.bin`/`.pt`/`.pth` files (torch's zip format), read without unpickling code and without reading data.

torch.load runs with `weights_only` under FakeTensorMode: tensors come back without storage but with the byte offset of their
data in the file, so that they are read by position just like safetensors.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.checkpoint.dtypes import BY_TORCH
from surgery.checkpoint.stored import Stored
from surgery.errors import Refused

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")


def read_pickled(path: str) -> dict[str, Stored]:
    """The tensors of one torch file, in file order. Raises Refused for anything that is not plain tensors."""
    if not zipfile.is_zipfile(path):
        raise Refused(
            f"{path}: not in torch's zip format (saved before torch 1.6, or damaged)",
            hint="load it once with the torch that made it and save it as safetensors",
        )
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises half a dozen types; every one means the same here
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise Refused(
            f"{path}: refused to unpickle: {_reason(problem, reason)}",
            hint="only plain tensors are loaded from pickles; convert it to safetensors where you trust it",
        ) from None
    found = {name: _stored(path, name, tensor) for name, tensor in _tensors(path, loaded)}
    if not found:
        raise Refused(f"{path}: holds no tensors")
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def _reason(problem: Exception, first_line: str) -> str:
    text = str(problem)
    for marker in ("unsupported GLOBAL ", "Unsupported global: GLOBAL ", "Unsupported class "):
        if marker in text:
            return f"it asks to run {text.split(marker, 1)[1].split()[0]}"
    return first_line[:200]


def _tensors(path: str, loaded: Any) -> Iterator[tuple[str, Any]]:
    import torch

    while isinstance(loaded, Mapping) and not any(isinstance(v, torch.Tensor) for v in loaded.values()):
        inner = next((loaded[k] for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            raise Refused(f"{path}: holds no state dict", hint="save the model's state_dict() as safetensors")
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise Refused(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    for name, value in loaded.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value


def _stored(path: str, name: str, tensor: Any) -> Stored:
    dtype = BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise Refused(f"{path}: `{name}` has dtype {tensor.dtype}, which safetensors cannot hold")
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise Refused(f"{path}: `{name}` has no position in the file", hint="convert it to safetensors")
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Stored(name, dtype, tuple(tensor.shape), path, start + tensor.storage_offset() * dtype.size, strides)
