"""The dialect's merge methods: their inputs and parameters. How each is computed here is in `lower`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED: Any = object()


@dataclass(frozen=True)
class Parameter:
    """kind: "number", "integer" or "boolean". scope: "shared", "input" (one per input) or "others" (per input but the base)."""

    name: str
    kind: str
    scope: str
    default: Any


@dataclass(frozen=True)
class Method:
    """base: "required", "optional" (it changes what is computed) or "ignored" (it is an input like any other)."""

    name: str
    base: str
    at_least: int
    at_most: float
    parameters: Mapping[str, Parameter]
    others: tuple[int, float] = (0, math.inf)  # bounds on the inputs beside the base


def _number(name: str, default: Any, scope: str = "shared") -> Parameter:
    return Parameter(name, "number", scope, default)


def _switch(name: str, default: bool) -> Parameter:
    return Parameter(name, "boolean", "shared", default)


def _method(
    name: str, base: str, *parameters: Parameter, count: tuple[int, float] = (1, math.inf), **rest: Any
) -> Method:
    return Method(name, base, *count, {p.name: p for p in parameters}, **rest)


def _task_arithmetic(name: str, *more: Parameter, normalize: bool, rescale: bool) -> Method:
    """The family that adds deltas to a base: sparsified or not, with or without election of signs."""
    return _method(
        name,
        "required",
        _number("weight", REQUIRED, "others"),
        _number("density", 1.0, "others"),
        _number("lambda", 1.0),
        _switch("normalize", normalize),
        _switch("rescale", rescale),
        _switch("int8_mask", False),  # how a mask is stored: of no consequence here
        *more,
    )


_GAMMA = _number("gamma", 0.01, "others")
_EPSILON = _number("epsilon", 0.15, "others")

_ALL = (
    _method("linear", "ignored", _number("weight", REQUIRED, "input"), _switch("normalize", True)),
    _method("slerp", "required", _number("t", REQUIRED), count=(2, 2)),
    _method(
        "nuslerp",
        "optional",
        _number("weight", REQUIRED, "others"),
        _switch("nuslerp_row_wise", False),
        _switch("nuslerp_flatten", True),
        others=(2, 2),
    ),
    _method(
        "multislerp",
        "optional",
        _number("weight", REQUIRED, "others"),
        _switch("normalize_weights", True),
        _number("eps", 1e-8),
        others=(1, math.inf),
    ),
    _method("karcher", "ignored", Parameter("max_iter", "integer", "shared", 10), _number("tol", 1e-5)),
    _task_arithmetic("task_arithmetic", normalize=False, rescale=False),
    _task_arithmetic("ties", normalize=True, rescale=False),
    _task_arithmetic("dare_ties", normalize=False, rescale=True),
    _task_arithmetic("dare_linear", normalize=False, rescale=True),
    _task_arithmetic("breadcrumbs", _GAMMA, normalize=False, rescale=False),
    _task_arithmetic("breadcrumbs_ties", _GAMMA, normalize=False, rescale=False),
    _task_arithmetic("della", _EPSILON, normalize=True, rescale=True),
    _task_arithmetic("della_linear", _EPSILON, normalize=False, rescale=True),
    _method("sce", "required", _number("select_topk", 1.0), _switch("int8_mask", False)),
    _method("ram", "required", _number("epsilon", 1e-5)),
    _method("ramplus_tl", "required", _number("r", 0.1), _number("alpha", 0.2), _number("epsilon", 1e-5)),
    _method("model_stock", "required", _switch("filter_wise", False), count=(3, math.inf)),
    _method("nearswap", "required", _number("t", REQUIRED), count=(2, 2)),
    _method("arcee_fusion", "required", count=(2, 2)),
    _method("passthrough", "ignored", _number("scale", None, "input"), count=(1, 1)),
)
METHODS = {m.name: m for m in _ALL}
