"""The JSON Schema of recipes, derived from the operators' declarations: validates here, completes in editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery import steps  # noqa: F401  registers every form
from surgery.checkpoint.dtypes import WRITABLE_FLOATS
from surgery.graph.apply import MISSING
from surgery.graph.forms import Form, forms
from surgery.ops import registry
from surgery.ops.declare import REQUIRED, Op, Param

_TOKENIZER = {"type": "string", "description": "A model, whose tokenizer goes along; union, or base."}
_ROW = {
    "description": "Where the token's row comes from: a model, zero, {model, token} or {model, id}.",
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "required": ["model"],
            "additionalProperties": False,
            "properties": {
                "model": {"type": "string"},
                "token": {"type": "string", "description": "The row of this token instead."},
                "id": {"type": "integer", "minimum": 0, "description": "The row at this id instead."},
            },
        },
    ],
}
_RULE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "source": _ROW,
        "force": {"type": "boolean", "description": "Also in models that have the token; default: where it lacks."},
    },
}
_PAD = {"type": "integer", "minimum": 1, "description": "Rows are added up to a multiple of this: the mean of all tokens."}
_TOKENS = {
    "tokenizer": {
        "description": "The output's tokens; models whose tokens have other ids are aligned to them.",
        "anyOf": [
            _TOKENIZER,
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "source": _TOKENIZER,
                    "tokens": {"type": "object", "additionalProperties": _RULE},
                    "pad_to_multiple_of": _PAD,
                },
            },
        ],
    },
    "pad_to_multiple_of": _PAD,
    "chat_template": {
        "type": "string",
        "description": "auto (the commonest among the inputs), a model, a built-in format, literal Jinja, or a file.",
    },
}
_NAMES = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}


def recipe_schema() -> dict[str, Any]:
    """The schema of the native recipe language."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "weight-surgery recipe",
        "type": "object",
        "required": ["models", "output"],
        "additionalProperties": False,
        "properties": {
            "models": {
                "type": "object",
                "minProperties": 1,
                "description": "Checkpoints by name: a path, a hub id with @revision, or {source, revision, base}.",
                "additionalProperties": {
                    "anyOf": [
                        {"type": "string"},
                        {
                            "type": "object",
                            "required": ["source"],
                            "additionalProperties": False,
                            "properties": {
                                "source": {"type": "string"},
                                "revision": {"type": "string"},
                                "base": {"type": "string", "description": "A delta package's base: a model or path."},
                            },
                        },
                    ]
                },
            },
            "steps": {
                "type": "object",
                "description": "Named operations in order; a step may use models and earlier steps.",
                "additionalProperties": {"$ref": "#/$defs/step"},
            },
            "output": {
                "type": "object",
                "required": ["from"],
                "additionalProperties": False,
                "properties": {
                    "from": {"type": "string", "description": "The model or step to write."},
                    "dtype": {"enum": list(WRITABLE_FLOATS), "description": "Float type; default: each tensor's own."},
                    "shard_size": {"type": ["string", "integer"], "description": "Bytes per file, like 5GB."},
                    **_TOKENS,
                    "integers": {"type": "string", "description": "The model whose integer tensors are taken."},
                    "precision": {"enum": ["float32", "float64"], "description": "Arithmetic; float32 by default."},
                },
            },
        },
        "$defs": {
            "step": {
                "type": "object",
                "required": ["op", "of"],
                "properties": {"op": {"enum": sorted([*registry, *forms])}},
                "allOf": [
                    {"if": {"properties": {"op": {"const": op.name}}}, "then": step_schema(op)}
                    for op in registry.values()
                ]
                + [
                    {"if": {"properties": {"op": {"const": form.name}}}, "then": form_schema(form)}
                    for form in forms.values()
                ],
            }
        },
    }


def step_schema(op: Op) -> dict[str, Any]:
    """The schema of a step that applies `op`."""
    missing = {"enum": list(MISSING), "description": "What happens to a tensor that not every input has."}
    properties: dict[str, Any] = {"op": {"const": op.name, "description": op.summary}, "of": _NAMES, "missing": missing}
    properties |= {p.name: _param(p) for p in op.params}
    required = ["op", "of", *(p.name for p in op.params if p.default is REQUIRED)]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def form_schema(form: Form) -> dict[str, Any]:
    """The schema of a step that is no operator."""
    properties = {"op": {"const": form.name, "description": form.summary}, "of": _NAMES, **form.keys}
    required = ["op", "of", *form.required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _param(param: Param) -> dict[str, Any]:
    about: dict[str, Any] = {"description": param.doc}
    if param.default is not REQUIRED and param.default is not None:
        about["default"] = param.default
    if param.kind == "boolean":
        return {"type": "boolean", **about}
    if param.kind == "choice":
        return {"enum": list(param.choices), **about}
    if param.kind == "rules":
        return {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}, **about}
    one = _number(param)
    if param.fixed:
        return one | about
    gradient = {"type": "array", "items": one, "minItems": 1}
    plain: list[Any] = [one, gradient]
    plain += [{"enum": list(param.words)}] if param.words else []
    by_name = {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": plain}}
    forms = [*plain, by_name]
    if param.per_input:
        forms.append({"type": "array", "items": {"anyOf": list(forms)}, "minItems": 1})
    return {"anyOf": forms, **about}


def _number(param: Param) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "integer" if param.kind == "integer" else "number"}
    if param.low > float("-inf"):
        made["exclusiveMinimum" if param.above else "minimum"] = param.low
    if param.high < float("inf"):
        made["maximum"] = param.high
    return made


def shape_only(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without what operators check themselves, with better words: steps keep only `op` and `of`."""
    made = dict(schema)
    step = {"type": "object", "required": ["op", "of"], "properties": {"of": _NAMES, "op": {"type": "string"}}}
    made["$defs"] = {"step": step}
    output = made["properties"]["output"]
    properties = output["properties"] | {key: {} for key in _TOKENS}
    made["properties"] = made["properties"] | {"output": output | {"properties": properties}}
    return made
