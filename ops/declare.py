"""How an operator is declared. Recipe keys, validation, help, docs and the way it streams all come from the declaration.

An operator is a plain function plus an `Op`. There are two kinds:

* *linear*: the function returns one coefficient per input; the result is the weighted sum. Whatever can be linear should be:
  the engine then fuses chains of such operators into one pass and never needs torch.
* *pointwise*: the function maps tensors to a tensor, and the declaration says how much of a tensor it must see at once
  (`locality`: "elementwise", "rows" or "matrix").

Either kind may ask for a `statistic` over its inputs first (norms, thresholds: see `surgery.ops.statistics`), over the tensor
or over the whole model. Functions see float32 or float64 tensors, never mutate them, and know nothing of files or names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

REQUIRED = object()
FLOAT32_MAX = 3.4028234663852886e38  # arithmetic is in float32: a larger number overflows whatever it multiplies
SECTIONS = ("Maths", "Shapes", "Evidence", "Known problems", "Cost", "Presets", "Example", "References")


@dataclass(frozen=True)
class Param:
    """One keyword of an operator.

    kind: "number", "integer", "boolean", "choice" or "rules". Numbers may vary over the model (a list is a gradient over depth,
    a map goes from name glob to value) unless `fixed`. per_input: one value for every input from position `first_input` on,
    or a list of them. rank: a number of singular directions, of which a matrix has min(m, n). words: strings accepted beside
    numbers, such as "auto".
    """

    name: str
    kind: str
    default: Any
    doc: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # the lower bound itself is excluded
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    per_input: bool = False
    first_input: int = 0
    fixed: bool = False
    rank: bool = False

    @property
    def range(self) -> str:
        """The accepted values, for people."""
        if self.kind == "choice":
            return " | ".join(self.choices)
        if self.kind in ("boolean", "rules"):
            return self.kind if self.kind == "boolean" else "map of glob to input"
        low = "" if self.low == -math.inf else f"{'>' if self.above else '≥'} {self.low:g}"
        high = "" if self.high == math.inf else f"≤ {self.high:g}"
        return " ".join(p for p in (self.kind, ", ".join(filter(None, (low, high))), *(f"or {w}" for w in self.words)) if p)

    def problem(self, value: Any) -> str | None:
        """What is wrong with one plain value (no list or map), or None."""
        if value is None and self.default is None:
            return None
        if self.kind == "boolean":
            return None if isinstance(value, bool) else "must be true or false"
        if self.kind == "choice":
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.kind == "rules":
            ok = isinstance(value, Mapping) and value and all(isinstance(k, str) for k in value)
            return None if ok else "must be a map of tensor-name glob to input name"
        if isinstance(value, str) and value in self.words:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            return f"must be a finite {self.kind}" + "".join(f" or `{w}`" for w in self.words)
        if abs(value) > FLOAT32_MAX:
            return f"must be at most {FLOAT32_MAX:.3g} in size: more overflows float32"
        if self.kind == "integer" and int(value) != value:
            return "must be a whole number"
        if value < self.low or value > self.high or (self.above and value == self.low):
            return f"must be {self.range}"
        return None


def number(name: str, default: Any, doc: str, **limits: Any) -> Param:
    return Param(name, "number", default, doc, **limits)


def integer(name: str, default: Any, doc: str, **limits: Any) -> Param:
    return Param(name, "integer", default, doc, fixed=True, **limits)


def boolean(name: str, default: bool, doc: str) -> Param:
    return Param(name, "boolean", default, doc, fixed=True)


def choice(name: str, default: str | None, choices: Sequence[str], doc: str) -> Param:
    return Param(name, "choice", default, doc, choices=tuple(choices), fixed=True)


@dataclass(frozen=True)
class Takes:
    """The inputs: their names in order, the space of each, and how many. A last name ending in `…` takes any number.

    statistics: the kind ("gram", "fisher") of statistics checkpoint that the operator needs of every model. Then the second
    half of the inputs are those, in the order of the models; `space` speaks of the models only.
    """

    names: tuple[str, ...]
    space: str | tuple[str, ...]  # "weights", "delta", "mask", "same" (any, all alike), or one per name
    at_least: int
    at_most: float
    statistics: str = ""

    def models(self, count: int) -> int:
        """How many of `count` inputs are models or deltas rather than statistics."""
        return count // 2 if self.statistics else count

    def space_of(self, position: int) -> str:
        if isinstance(self.space, str):
            return self.space
        return self.space[min(position, len(self.space) - 1)]

    @property
    def text(self) -> str:
        spaces = [self.space_of(i) for i in range(len(self.names))]
        if self.statistics:
            spaces[-1] = f"{self.statistics} statistics, one for each"
        return ", ".join(f"{n} ({s})" for n, s in zip(self.names, spaces, strict=True))


def takes(*names: str, space: str | tuple[str, ...], at_least: int | None = None, statistics: str = "") -> Takes:
    many = names[-1].endswith("…")
    return Takes(names, space, len(names) if at_least is None else at_least, math.inf if many else len(names), statistics)


def _alike(shape: Sequence[int], statistic: Sequence[int]) -> str | None:
    return None if tuple(shape) == tuple(statistic) else f"must have the shape {list(shape)}, has {list(statistic)}"


def _holds(count: int, shape: Sequence[int]) -> int:
    """What one eigendecomposition at a time and a few products take (`surgery.ops.matrices`), of each matrix of a stack."""
    m, n = [1, *shape][-2:]
    return 9 * math.prod(shape) + 8 * (6 * m * n + 8 * min(m, n) ** 2)


@dataclass(frozen=True)
class Op:
    """A declared operator. Calling it on tensors computes; calling it on checkpoints builds a lazy one.

    An operator that takes statistics gets its tensors as models, then statistics. Elementwise, both have the same shape;
    in locality "matrix" `fits` decides, and the operator cannot ask for a streamed `statistic` besides.
    """

    name: str
    function: Callable[..., Any]
    linear: bool
    takes: Takes
    gives: str  # "weights", "delta" or "first" (the space of the first input)
    params: tuple[Param, ...]
    locality: str = "elementwise"
    statistic: Callable[..., Any] | None = None  # (count, sizes, **params) -> Statistic, or None if not needed
    scope: Callable[..., str] = field(default=lambda **_: "tensor")  # (**params) -> "tensor" or "global"
    needs: frozenset[str] = frozenset()  # of "depth", "key", "at": passed to the function as keywords
    pads: Callable[..., bool] = field(default=lambda **_: False)  # (**params): missing trailing rows count as zero
    check: Callable[..., str | None] = field(default=lambda count, **_: None)  # (count, **params) -> what is wrong
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    reduces: Callable[..., Sequence[float] | None] = field(default=lambda count, shape, depth, **_: None)
    # (count, shape, depth, **params): coefficients where the operator is a plain weighted sum for tensors of that shape
    copies: bool = False  # hands stored bytes on: codes of a quantised model stay what they are
    arrays: Callable[..., Any] | None = None  # the same function on numpy arrays, bit for bit: a run then needs no torch
    blocks: Callable[..., Any] | None = None
    """(count, at=, measured=, **params): a `surgery.ops.blocks.Step` that computes a piece of float32 numbers block by block,
    bit for bit as `arrays`; or None if it cannot now."""
    fits: Callable[[Sequence[int], Sequence[int]], str | None] = _alike  # (shape, statistic's shape) -> what is wrong
    remark: Callable[..., str | None] = field(default=lambda count, shape, **_: None)
    """(count, shape, **params): what the plan says of tensors of that shape, where the operator does less than its name."""
    anywhere: bool = False  # of locality "matrix": tensors may lie on any device of torch, and the result then lies there
    holds: Callable[..., int] = field(default=lambda count, shape, **_: _holds(count, shape))
    """(count, shape, **params): bytes that an operator of locality "matrix" holds at most beside its inputs, of which there are
    `count`, its result and what LAPACK works in included, for float32 inputs; float64 may take twice as much."""
    without: Callable[..., Sequence[float]] = field(default=lambda count, **_: [1.0 / count] * count)
    """(models, **params): the coefficients where a tensor has no statistics."""

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        return self.doc.split("\n", 1)[0].rstrip(".")

    def section(self, title: str) -> str:
        """The text under `title:` in the docstring, "" if absent."""
        lines, inside = [], False
        for line in self.doc.splitlines()[1:]:
            if line.rstrip().endswith(":") and line.strip()[:-1] in SECTIONS:
                inside = line.strip()[:-1] == title
            elif inside:
                lines.append(line)
        return inspect.cleandoc("\n".join(lines)).strip()

    def param(self, name: str) -> Param | None:
        return next((p for p in self.params if p.name == name), None)

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` with presets and defaults filled in. Raises ValueError for unknown or missing parameters."""
        unknown = given.keys() - {p.name for p in self.params}
        if unknown:
            raise ValueError(f"{self.name} has no parameter `{min(unknown)}`")
        values = {p.name: p.default for p in self.params} | dict(given)
        for switch, table in self.presets.items():
            values |= {k: v for k, v in table.get(str(values[switch]), {}).items() if given.get(k) is None}
        for name, value in values.items():
            if value is REQUIRED:
                raise ValueError(f"{self.name} needs `{name}`")
        return values

    def per_input(self, name: str, value: Any, count: int) -> list[Any]:
        """Expand a per-input parameter to one value for each of the `count - first_input` inputs it concerns."""
        param = self.param(name)
        assert param is not None
        wanted = self.takes.models(count) - param.first_input
        if not isinstance(value, list | tuple):
            return [value] * wanted
        if len(value) != wanted:
            what = "deltas" if self.takes.space_of(count - 1) == "delta" else "inputs"
            extra = "" if wanted > 1 else f"; a gradient over depth is written {name}: [{list(value)}]"
            raise ValueError(f"`{name}` has {len(value)} values for {wanted} {what}{extra}")
        return list(value)

    def __call__(self, *inputs: Any, **params: Any) -> Any:
        """Apply to tensors (eagerly) or to checkpoints (lazily). Inputs may be given as one list."""
        if len(inputs) == 1 and isinstance(inputs[0], list | tuple):
            inputs = tuple(inputs[0])
        for value in inputs:
            if hasattr(value, "__surgery_op__"):
                return value.__surgery_op__(self, inputs, params)
        from surgery.ops.eager import apply_to_tensors

        models = self.takes.models(len(inputs))
        if models < len(inputs) and self.locality == "matrix" and self.takes.at_least <= len(inputs):
            return apply_to_tensors(*self._given(inputs[:models], inputs[models:], params))
        return apply_to_tensors(self, inputs, params)

    def _given(self, models: Sequence[Any], statistics: Sequence[Any], params: Mapping[str, Any]) -> tuple[Any, ...]:
        """This operator with its statistics filled in, as one that takes models alone; and what to apply it to."""
        count = len(models) + len(statistics)
        problem = self.check(count, **self.complete(params))
        for model, statistic in zip(models, statistics, strict=not problem):
            problem = problem or self.fits(model.shape, statistic.shape)
        problem = f"statistics: {problem}" if problem else None
        alone = replace(self.takes, at_least=len(models), at_most=len(models), statistics="")
        return replace(self.with_statistics(statistics), takes=alone, check=lambda count, **_: problem), models, params

    def with_statistics(self, statistics: Sequence[Any]) -> Op:
        """This operator with tensors of statistics filled in: its function then takes models alone. Matrix locality."""
        given = self.function
        return replace(self, function=lambda tensors, **rest: given([*tensors, *statistics], **rest))


class Registry(dict[str, Op]):
    """name -> Op. Registering a name twice is an error unless `replace` is set."""

    def add(self, op: Op, *, replace: bool = False) -> Op:
        if op.name in self and not replace:
            raise ValueError(f"operator `{op.name}` is registered twice")
        self[op.name] = op
        return op


registry = Registry()


def linear(name: str, *, takes: Takes, gives: str, params: Sequence[Param] = (), **rest: Any) -> Callable[..., Op]:
    """Declare an operator whose function returns one coefficient per input: `function(count, **params)`."""

    def declare(function: Callable[..., Sequence[float]]) -> Op:
        return registry.add(Op(name, function, True, takes, gives, tuple(params), **_needs(rest)))

    return declare


def pointwise(
    name: str, *, takes: Takes, gives: str, locality: str, params: Sequence[Param] = (), **rest: Any
) -> Callable[..., Op]:
    """Declare an operator whose function maps a list of tensors to a tensor: `function(tensors, **params)`."""

    def declare(function: Callable[..., Any]) -> Op:
        return registry.add(Op(name, function, False, takes, gives, tuple(params), locality=locality, **_needs(rest)))

    return declare


def _needs(rest: dict[str, Any]) -> dict[str, Any]:
    return rest | {"needs": frozenset(rest.get("needs", ()))}
