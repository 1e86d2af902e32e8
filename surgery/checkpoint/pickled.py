"""Headers of `.bin`/`.pt`/`.pth` files (torch's zip format), read without unpickling code and without reading data.

torch.load runs with `weights_only` under FakeTensorMode: tensors come back without storage but with the byte offset of their
data in the file, so that they are read by position just like safetensors.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.checkpoint.dtypes import BY_TORCH
from surgery.checkpoint.stored import Stored
from surgery.errors import Refused

_MAX_PICKLE = 100_000_000  # bytes of the pickle itself, as for headers of safetensors
_MAX_ALIGNMENT, _DIGITS = 1 << 20, 8
_MAX_WRAPPERS = 8
_CONVERT = "only plain tensors are loaded from pickles; convert it to safetensors where you trust it"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")


def read_pickled(path: str) -> dict[str, Stored]:
    """The tensors of one torch file, in file order. Raises Refused for anything that is not plain tensors."""
    size = check_archive(path)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles that it did not write: they are refused or they are fine
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises half a dozen types; every one means the same here
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise Refused(
            f"{path}: refused to unpickle: {_reason(problem, reason)}",
            hint=_CONVERT,
        ) from None
    try:
        found = {name: _stored(path, name, tensor, size) for name, tensor in _tensors(path, loaded)}
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as problem:
        raise Refused(f"{path}: holds tensors that are not plain ({type(problem).__name__})", hint=_CONVERT) from None
    if not found:
        raise Refused(f"{path}: holds no tensors")
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def check_archive(path: str) -> int:
    """Bytes of the file. Raises Refused if it is not what torch writes: a zip from its first byte on (anything else would go to
    torch's old readers), nothing in it compressed (data is read by position, and a pickle might unpack to any size)."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            size = file.seek(0, 2)
        if magic != b"PK\x03\x04" or not zipfile.is_zipfile(path):
            raise Refused(
                f"{path}: not in torch's zip format (saved before torch 1.6, or damaged)",
                hint="load it once with the torch that made it and save it as safetensors",
            )
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise Refused(f"{path}: {record.filename!a} in it is compressed; torch never does that", hint=_CONVERT)
                if record.filename.endswith(".storage_alignment"):
                    _check_alignment(path, archive.read(record) if record.file_size < _DIGITS else b"")
                if record.filename.endswith(".pkl") and record.file_size > _MAX_PICKLE:
                    raise Refused(f"{path}: its pickle has {record.file_size} bytes; at most {_MAX_PICKLE} are read")
    except OSError as problem:
        raise Refused(f"{path}: cannot be read: {problem.strerror}") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError) as problem:
        raise Refused(f"{path}: a damaged zip archive ({problem})", hint="fetch it again") from None
    return size


def _check_alignment(path: str, said: bytes) -> None:
    """torch divides by this number, in C: zero would end the process."""
    if not said.isdigit() or not 0 < int(said) <= _MAX_ALIGNMENT:
        raise Refused(f"{path}: aligns its records to {said!r} bytes; torch writes 64", hint=_CONVERT)


def _reason(problem: Exception, first_line: str) -> str:
    text = str(problem)
    for marker in ("unsupported GLOBAL ", "Unsupported global: GLOBAL ", "Unsupported class "):
        if marker in text:
            return f"it asks to run {text.split(marker, 1)[1].split()[0]}"
    if "WeightsUnpickler error:" in text:  # what torch says before that is how to switch the protection off
        said = [line.strip() for line in text.split("WeightsUnpickler error:", 1)[1].splitlines() if line.strip()]
        return f"not a pickle of tensors ({said[0][:150]})" if said else "not a pickle of tensors"
    return first_line[:200]


def _tensors(path: str, loaded: Any) -> Iterator[tuple[str, Any]]:
    import torch

    for _ in range(_MAX_WRAPPERS):
        if not isinstance(loaded, Mapping) or any(isinstance(v, torch.Tensor) for v in loaded.values()):
            break
        inner = next((loaded[k] for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            raise Refused(f"{path}: holds no state dict", hint="save the model's state_dict() as safetensors")
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise Refused(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    for name, value in loaded.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value


def _stored(path: str, name: str, tensor: Any, size: int) -> Stored:
    """Where a tensor lies in a file of `size` bytes."""
    if not name.isprintable():
        raise Refused(f"{path}: holds a tensor whose name has characters that cannot be printed: {ascii(name)[:100]}")
    dtype = BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise Refused(f"{path}: `{name}` has dtype {tensor.dtype}, which safetensors cannot hold")
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise Refused(f"{path}: `{name}` has no position in the file", hint="convert it to safetensors")
    if tensor.is_conj() or tensor.is_neg():
        raise Refused(f"{path}: `{name}` is stored conjugated or negated: its bytes are not its values", hint=_CONVERT)
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    stored = Stored(name, dtype, tuple(tensor.shape), path, start + tensor.storage_offset() * dtype.size, strides)
    if stored.nbytes > size or stored.offset < 0 or stored.offset + stored.span > size:
        raise Refused(f"{path}: `{name}` claims {stored.nbytes} bytes at {stored.offset}, the file has {size}", hint=_CONVERT)
    return stored
