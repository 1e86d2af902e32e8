"""Element types as they are stored on disk, without importing torch.

The names are safetensors' own. Arithmetic happens in float32 or float64 (see `surgery.engine.convert`); this table says
which types can take part in it at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import Refused, did_you_mean


@dataclass(frozen=True)
class DType:
    """One storage type: `name` as in a safetensors header, `size` in bytes, `torch` the name of torch's dtype."""

    name: str
    size: int
    kind: str  # "float", "int", "bool" or "complex"
    torch: str
    largest: float = float("inf")  # largest finite value (floats only)

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_scaled_code(self) -> bool:
        """8-bit floats are often codes that mean something only together with a scale tensor."""
        return self.kind == "float" and self.size == 1

    def __str__(self) -> str:
        return self.torch


_ALL = (
    DType("F64", 8, "float", "float64", 1.7976931348623157e308),
    DType("F32", 4, "float", "float32", 3.4028234663852886e38),
    DType("BF16", 2, "float", "bfloat16", 3.3895313892515355e38),
    DType("F16", 2, "float", "float16", 65504.0),
    DType("F8_E4M3", 1, "float", "float8_e4m3fn", 448.0),
    DType("F8_E5M2", 1, "float", "float8_e5m2", 57344.0),
    DType("F8_E4M3FNUZ", 1, "float", "float8_e4m3fnuz", 240.0),
    DType("F8_E5M2FNUZ", 1, "float", "float8_e5m2fnuz", 57344.0),
    DType("F8_E8M0", 1, "float", "float8_e8m0fnu", 1.7014118346046923e38),
    DType("I64", 8, "int", "int64"),
    DType("I32", 4, "int", "int32"),
    DType("I16", 2, "int", "int16"),
    DType("I8", 1, "int", "int8"),
    DType("U64", 8, "int", "uint64"),
    DType("U32", 4, "int", "uint32"),
    DType("U16", 2, "int", "uint16"),
    DType("U8", 1, "int", "uint8"),
    DType("BOOL", 1, "bool", "bool"),
    DType("C64", 8, "complex", "complex64"),
)

BY_NAME = {d.name: d for d in _ALL}
BY_TORCH = {d.torch: d for d in _ALL}
_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_ALIASES |= {"fp64": "float64", "double": "float64", "f32": "float32", "f16": "float16", "float8_e4m3": "float8_e4m3fn"}

BF16 = BY_NAME["BF16"]
F16 = BY_NAME["F16"]
F32 = BY_NAME["F32"]
F64 = BY_NAME["F64"]
WRITABLE_FLOATS = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


def float_dtype(word: str) -> DType:
    """The type a user means by `bfloat16`, `torch.bfloat16`, `bf16` or `BF16`.

    Raises Refused if it is no float type that a checkpoint can be written in.
    """
    name = str(word).removeprefix("torch.")
    if name in BY_NAME:
        name = BY_NAME[name].torch
    name = _ALIASES.get(name.lower(), name.lower())
    if name not in WRITABLE_FLOATS:
        raise Refused(f"`{word}` is not a float type to write", hint=did_you_mean(name, WRITABLE_FLOATS))
    return BY_TORCH[name]


def promote(first: DType, second: DType) -> DType:
    """The float type that holds both without losing range or precision (bfloat16 with float16 gives float32)."""
    if first == second:
        return first
    wide, narrow = sorted((first, second), key=lambda d: -d.size)
    return wide if wide.size > narrow.size and wide.size >= 4 else F32
