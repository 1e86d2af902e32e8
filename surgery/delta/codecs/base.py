"""What a codec is: exact ones give back every bit, lossy ones a float32 delta to add to the base.

A lossy codec is an object that satisfies `Lossy`, registered by decorating its class (or passing an instance):

    @lossy
    class Dither:
        name = "dither/1"
        options = {"step": {"type": "number", "exclusiveMinimum": 0, "description": "width of a quantiser step"}}
        def encode(self, delta, *, key, step): ...
        def decode(self, coded, shape, key, start, stop): ...

The name with its version goes into packages; a reader refuses names that it does not know. Reconstruction is part of the
format: target = round_to_dtype(float32(base) + decoded delta), elementwise, one round to nearest even, no fused multiply-add.
So `decode` must give the same bits on every machine: numpy integers and elementwise float32, no BLAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from surgery.errors import Refused, did_you_mean


@dataclass(frozen=True)
class Coded:
    """One tensor, coded. parts: named payloads (when decoding, any bytes-like). facts: plain JSON.

    With shape and key they are all that decoding needs. Both come from a file then: sizes must be checked before memory is
    asked for.
    """

    parts: Mapping[str, bytes]
    facts: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(len(p) for p in self.parts.values())


class Lossy(Protocol):
    """name: with version, `dither/1`. options: what `encode` takes, as JSON Schemas with a description (and default)."""

    name: str
    options: Mapping[str, Mapping[str, Any]]

    def encode(self, delta: NDArray[np.float32], *, key: str, **options: Any) -> Coded:
        """delta: tuned minus base, float32, finite, in the tensor's full shape (any, also () and sizes of 0).

        key: the tensor's name; whatever is random is drawn from `surgery.ops.random` and keyed on it. Raises Refused for what
        the codec cannot code (a vector for a codec of matrices).
        """

    def decode(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> NDArray[np.float32]:
        """Elements `start` to `stop` (flat) of the coded delta. Raises Refused if the payload is damaged."""


LOSSY: dict[str, Lossy] = {}

C = TypeVar("C")


def lossy(codec: C) -> C:
    """Register a lossy codec: an instance, or a class that is made without arguments."""
    made: Any = codec() if isinstance(codec, type) else codec
    if made.name in LOSSY:
        raise ValueError(f"codec `{made.name}` is registered twice")
    LOSSY[made.name] = made
    return codec


def lossy_codec(name: str) -> Lossy:
    """The lossy codec called `name` (`dither/1`, or `dither` where only one version is known). Raises Refused."""
    found = [codec for known, codec in LOSSY.items() if name in (known, known.partition("/")[0])]
    if len(found) != 1:
        near = did_you_mean(name, [known.partition("/")[0] for known in LOSSY])
        raise Refused(f"there is no lossy codec `{name}`", hint=near or "`surgery delta pack --codec list` names them")
    return found[0]


def check_options(codec: Lossy, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with defaults filled in. Raises Refused for one that is unknown, wrong or missing."""
    import jsonschema

    made = {}
    for key in options:
        if key not in codec.options:
            hint = did_you_mean(key, codec.options) if codec.options else f"{codec.name} has no options"
            raise Refused(f"codec {codec.name} has no option `{key}`", hint=hint)
    for key, schema in codec.options.items():
        if key in options:
            for error in jsonschema.Draft202012Validator(dict(schema)).iter_errors(options[key]):
                raise Refused(f"codec {codec.name}: option `{key}` is wrong: {error.message}")
            value = options[key]  # `--bits 2` is 2.0, which an enumeration of integers holds to be one of its own
            whole = isinstance(value, float) and value.is_integer() and any(type(v) is int for v in schema.get("enum", ()))
            made[key] = int(value) if whole else value
        elif "default" in schema:
            made[key] = schema["default"]
        else:
            raise Refused(f"codec {codec.name} needs the option `{key}`", hint=schema.get("description"))
    return made
