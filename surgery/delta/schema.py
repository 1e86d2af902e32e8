"""The JSON Schema of a package's manifest. `docs/delta-format.md` says what the fields mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery.checkpoint.dtypes import BY_NAME

SPECS = (1, 2)
MODES = ("exact", "lossy", "progressive", "tasks")

_HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**62}
_SHAPE = {"type": "array", "maxItems": 64, "items": _COUNT}
_NAME = {"type": "string"}
_LEAVES = {"type": "string", "pattern": "^([0-9a-f]{64}){2,}$"}  # one after another
PART = re.compile("^[A-Za-z0-9_.-]{1,64}$")
_PART = {"type": "string", "pattern": PART.pattern}


def _object(required: list[str], properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": dict(properties)}


_REFERENCE = _object(
    ["sha256"], {"name": _NAME, "dtype": {"enum": list(BY_NAME)}, "shape": _SHAPE, "sha256": _HASH, "leaves": _LEAVES}
)
_CHUNKS = {
    "lengths": {"type": "array", "items": _COUNT},
    "checks": {"type": "string", "pattern": "^([0-9a-f]{16})*$"},
}
_EXACT_LAYER = _object(["codec", "lengths", "checks"], {"codec": {"type": "string"}, **_CHUNKS, "limit": _COUNT})
_ERROR = _object(
    ["max_abs", "rel_fro", "gain"],
    {
        "max_abs": {"type": "number", "minimum": 0},
        "rel_fro": {"type": ["number", "null"], "minimum": 0},
        "gain": {"type": ["number", "null"]},
        "bound": {"type": ["number", "null"], "minimum": 0},
        "output": {"type": ["number", "null"], "minimum": 0},
    },
)
_TEXTS = {"file": _NAME, "sha256": _HASH, "texts": _COUNT, "tokens": _COUNT}
_MEASURE = {"type": ["number", "null"], "minimum": 0}
_EVALUATION = _object(
    [*_TEXTS, "held_out", "outputs", "error", "kl", "agree"],
    {
        **_TEXTS,
        "held_out": {"type": "boolean"},
        "outputs": {"enum": ["logits", "hidden states"]},
        "error": _MEASURE,
        "kl": _MEASURE,
        "agree": {**_MEASURE, "maximum": 1},
    },
)
_CALIBRATION = _object([*_TEXTS, "fitted"], {**_TEXTS, "fitted": {"type": "object", "additionalProperties": _COUNT}})
_DELTA = {
    "codec": {"type": "string"},
    "key": _NAME,
    "parts": {"type": "array", "items": _PART},
    "facts": {"type": "object"},
}
_LOSSY_LAYER = _object([*_DELTA, "error"], {**_DELTA, "error": _ERROR})
_MASKED_LAYER = _object(
    ["codec", "shared", "scale", "lengths", "checks", "error"],
    {"codec": {"type": "string"}, "shared": _NAME, "scale": {"type": "number"}, **_CHUNKS, "error": _ERROR},
)
_TENSOR = _object(
    ["dtype", "shape", "sha256"],
    {
        "dtype": {"enum": list(BY_NAME)},
        "shape": _SHAPE,
        "sha256": _HASH,
        "leaves": _LEAVES,
        "base": _REFERENCE,
        "same": {"const": True},
        "alias": _NAME,
        "layer": {"anyOf": [_EXACT_LAYER, _LOSSY_LAYER, _MASKED_LAYER]},
        "preview": _object(["sha256"], {"sha256": _HASH, "leaves": _LEAVES}),
        "residual": _EXACT_LAYER,
    },
)
_TARGET = {
    "target": _object(
        ["root", "files"],
        {
            "root": _HASH,
            "preview": _HASH,
            "files": {
                "type": "array",
                "items": _object(["path", "size", "header"], {"path": _NAME, "size": _COUNT, "header": _COUNT}),
            },
        },
    ),
    "tensors": {"type": "object", "additionalProperties": _TENSOR},
    "dropped": {"type": "array", "items": _NAME},
    "files": {
        "type": "object",
        "additionalProperties": _object(
            ["size", "sha256", "from"], {"size": _COUNT, "sha256": _HASH, "from": {"enum": ["base", "package"]}}
        ),
    },
}
_SHARED = _object([*_DELTA, "shape"], {**_DELTA, "shape": _SHAPE})

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "delta package manifest, spec 1 and 2",
    **_object(
        ["spec", "producer", "mode", "base", "parts"],
        {
            "spec": {"enum": list(SPECS)},
            "producer": {"type": "string"},
            "mode": {"enum": list(MODES)},
            "base": _object(
                ["name", "root", "shapes", "tensors", "bytes"],
                {
                    "name": _NAME,
                    "root": _HASH,
                    "shapes": _HASH,
                    "tensors": _COUNT,
                    "bytes": _COUNT,
                    "repo": {"type": "string"},
                    "revision": {"type": "string"},
                },
            ),
            **_TARGET,
            "evaluation": _EVALUATION,
            "calibration": _CALIBRATION,
            "method": {"type": "string"},
            "shared": {"type": "object", "additionalProperties": _SHARED},
            "tasks": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": _PART,
                "additionalProperties": _object(list(_TARGET), _TARGET),
            },
            "parts": {
                "type": "array",
                "items": {"type": "array", "prefixItems": [_NAME, _COUNT, _HASH], "minItems": 2, "maxItems": 3},
            },
            "shards": {"type": "array", "minItems": 2, "maxItems": 99999, "items": _COUNT},
        },
    ),
    "if": {"properties": {"mode": {"const": "tasks"}}},
    "then": {"required": ["tasks", "shared", "method"], "not": {"anyOf": [{"required": [name]} for name in _TARGET]}},
    "else": {"required": list(_TARGET), "not": {"anyOf": [{"required": [n]} for n in ("tasks", "shared", "method")]}},
}


def newer(data: Mapping[str, Any]) -> bool:
    """Whether a manifest says what only spec 2 knows: then it must say so."""
    if data["mode"] in ("progressive", "tasks") or "shards" in data or "preview" in data.get("target", {}):
        return True
    return any("residual" in t or "preview" in t or "shared" in t.get("layer", {}) for t in data["tensors"].values())
