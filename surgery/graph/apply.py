"""Applying an operator to whole checkpoints: from declared parameters to one expression per tensor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from surgery.checkpoint.dtypes import F32, F64, DType, promote
from surgery.errors import did_you_mean
from surgery.graph import values
from surgery.graph.expr import Agree, Applied, Expr, Measure, Padded, weighted
from surgery.graph.informed import Informed
from surgery.graph.limits import check_ranks, remarks
from surgery.graph.node import Node, sources_of
from surgery.graph.packed import packed_codes, packing
from surgery.graph.scaled import dequantised
from surgery.ops.declare import REQUIRED, Op

MISSING = {
    "error": "refuse the plan",
    "keep": "take the tensor from the first input that has it, unchanged",
    "skip": "leave the tensor out",
}


class OpNode(Node):
    """`op` applied to `inputs` tensor by tensor.

    params as in recipes (scalars, gradients, glob maps, per-input lists). missing: what happens to a tensor that not every
    input has; one of MISSING. A delta's tensors that were deselected on purpose count as zero.

    An operator that takes statistics gets them as the second half of its inputs: looked up under the names of the models'
    tensors, they decide neither which tensors there are nor of what type. A tensor that some statistics lack is combined as
    the operator says for that case (`Op.without`). A mask is zero where it has no tensor, and decides no type either.
    """

    def __init__(
        self,
        op: Op,
        inputs: Sequence[Node],
        params: Mapping[str, Any],
        *,
        missing: str = "error",
        label: str | None = None,
        where: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(label, where)
        self.op, self.missing = op, missing
        self.inputs = tuple(inputs) if op.copies else tuple(map(dequantised, inputs))
        models = op.takes.models(len(self.inputs))
        self.models, self.statistics = self.inputs[:models], self.inputs[models:]
        self.plain: list[str] = []  # tensors combined without statistics, though the operator takes them
        self.verb = op.name.upper()
        self.given = dict(params)
        self._check_inputs()
        self.params = self._check_params()
        self.space = self.inputs[0].space if op.gives == "first" else op.gives

    # -- declaration against what was given ------------------------------------------------------------------------------

    def _check_inputs(self) -> None:
        takes, count = self.op.takes, len(self.inputs)
        if not takes.at_least <= count <= takes.at_most:
            wanted = f"{takes.at_least} or more" if takes.at_most > takes.at_least else f"{takes.at_least}"
            raise self.refuse(f"{self.op.name} takes {wanted} inputs ({takes.text}), got {count}", key="of")
        self._check_statistics()
        for i, node in enumerate(self.models):
            space = takes.space_of(i)
            wanted = self.inputs[0].space if space == "same" else space
            if node.space == wanted:
                continue
            name = node.label or f"input {i + 1}"
            if wanted == "mask" or node.space == "mask":
                message = f"{self.op.name} takes {wanted if wanted == 'mask' else 'no mask'} here; `{name}` is {_what(node)}"
                hint = "a mask is what `surgery sweep` with `method: graft` writes, and goes into `graft`"
            elif node.space == "statistics":
                message = f"{self.op.name} takes {'deltas' if wanted == 'delta' else wanted}; `{name}` is statistics"
                hint = "statistics go into `regmean` and `fisher`, after the models"
            elif wanted == "delta":
                message = f"{self.op.name} takes deltas; `{name}` is weights"
                hint = f"subtract its base first: {{op: diff, of: [{name}, base]}}"
            else:
                message = f"{self.op.name} takes weights here; `{name}` is a delta"
                hint = f"add it to its base first: {{op: add, of: [base, {name}]}}"
            raise self.refuse(message, hint=hint, key="of")
        if self.missing not in MISSING:
            raise self.refuse(f"missing: must be one of {', '.join(MISSING)}, got {self.missing!r}", key="missing")

    def _check_statistics(self) -> None:
        """Half of the inputs are statistics of the right kind, if the operator takes any."""
        kind = self.op.takes.statistics
        if not kind:
            return
        given = [n.space == "statistics" for n in self.inputs]
        if given != [False] * len(self.models) + [True] * (len(self.inputs) - len(self.models)) or len(given) % 2:
            raise self.refuse(
                f"{self.op.name} takes models, then one {kind} statistics checkpoint for each in the same order; "
                f"got {given.count(False)} models and {given.count(True)} statistics",
                hint=f"collect them: surgery statistics MODEL --kind {kind} --data FILE -o DIR",
                key="of",
            )
        for i, node in enumerate(self.statistics, len(self.models)):
            for source in sources_of(node):
                found = getattr(source, "kind", None)
                if found != kind:
                    raise self.refuse(f"{self.op.name} takes {kind} statistics; {self._name(i)} holds {found}", key="of")

    def _check_provenance(self) -> None:
        """Statistics speak of the weights that they were collected from, and of no others."""
        masks = [(self.models[0], n) for n in self.models if n.space == "mask"]
        for model, node in [*zip(self.models, self.statistics, strict=bool(self.statistics)), *masks]:
            made_from = [s.source for s in sources_of(model)]
            for source in sources_of(node):
                problem = source.mismatch(made_from) if hasattr(source, "mismatch") else None
                if problem:
                    raise self.refuse(problem, hint=f"collect them again from {model.label or 'that model'}", key="of")

    def _check_params(self) -> dict[str, Any]:
        known = [p.name for p in self.op.params]
        for name in self.given:
            if name not in known:
                hint = did_you_mean(name, known) if known else f"{self.op.name} has no parameters"
                raise self.refuse(f"{self.op.name} has no parameter `{name}`", hint=hint, key=name)
        for param in self.op.params:
            if param.default is REQUIRED and param.name not in self.given:
                raise self.refuse(f"{self.op.name} needs `{param.name}`: {param.doc}", hint=f"accepted: {param.range}")
        made = self.op.complete(self.given)
        for param in self.op.params:
            value = made[param.name]
            if param.per_input:
                try:
                    value = made[param.name] = self.op.per_input(param.name, value, len(self.inputs))
                except ValueError as problem:
                    raise self.refuse(f"{self.op.name}: {problem}", key=param.name) from None
            for part in value if param.per_input else [value]:
                self._check_value(param, part, nested=False)
        return made

    def _check_value(self, param: Any, value: Any, *, nested: bool) -> None:
        if param.kind != "rules" and not param.fixed and isinstance(value, Mapping) and not nested:
            if not value:
                raise self.refuse(f"`{param.name}` is an empty map", key=param.name)
            for inner in value.values():
                self._check_value(param, inner, nested=True)
            return
        if not param.fixed and isinstance(value, list | tuple):
            if not value:
                raise self.refuse(f"`{param.name}` is an empty gradient", key=param.name)
            for knot in value:
                problem = param.problem(knot) if not isinstance(knot, str) else "must be a number inside a gradient"
                if problem:
                    raise self.refuse(f"`{param.name}` {problem}, got {knot!r}", key=param.name)
            return
        problem = param.problem(value)
        if problem:
            raise self.refuse(f"`{param.name}` {problem}, got {value!r}", key=param.name)

    # -- from checkpoints to tensors -------------------------------------------------------------------------------------

    def _build(self) -> dict[str, Expr]:
        self._check_provenance()
        names: dict[str, None] = {}
        for node in self.models:
            names.update(dict.fromkeys(node.tensors))
        made: dict[str, Expr] = {}
        absent: list[tuple[str, list[int]]] = []
        shared: Measure | None = None
        for name in names:
            args = self._arguments(name)
            lacking = [i for i, a in enumerate(args) if a is _ABSENT]
            if lacking:
                if self.missing == "error":
                    absent.append((name, lacking))
                elif self.missing == "skip":
                    self.dropped[name] = f"not in {self._name(lacking[0])} (missing: skip)"
                elif (kept := next((a for a in args if isinstance(a, Expr)), None)) is not None:
                    if self.inputs[next(i for i, a in enumerate(args) if a is kept)].space == self.space:
                        made[name] = kept
                    else:
                        self.dropped[name] = f"a delta without a tensor in {self._name(lacking[0])} to add it to"
                continue
            expr = self._combine(name, args)
            if isinstance(expr, Applied) and self.op.statistic and expr.origin is self:
                shared = self._measure(expr, shared)
            made[name] = expr
        if absent:
            raise self._packed() or self._missing(absent)
        if self.statistics and len(self.plain) == len(made):
            raise self._unknown(made)
        self._check_globs(made)
        check_ranks(self, made, self._resolve)
        remarks(self, made)
        return made

    def _arguments(self, name: str) -> list[Any]:
        """Per input: its expression, _ZERO for a delta that was told to leave this tensor alone, or _ABSENT."""
        found: list[Any] = []
        for node in self.models:
            expr = node.tensors.get(name)
            if expr is None:
                expr = node.stand_in(name)
            if expr is None:
                expr = _ZERO if node.space == "mask" or (node.space == "delta" and name in node.left_out) else _ABSENT
            found.append(expr)
        return found

    def _combine(self, name: str, args: list[Expr]) -> Expr:
        present = [a for a, node in zip(args, self.models, strict=True) if a is not _ZERO and node.space != "mask"]
        if any(not a.dtype.is_float for a in present):
            reads = list({id(a): a for p in present for a in (p.args if isinstance(p, Agree) else [p])}.values())
            self._same_shape(name, args, exact=True)
            kinds = {a.dtype.name for a in reads}
            if len(kinds) > 1:
                found = f"`{name}` is {' and '.join(sorted(kinds))} in different inputs; it cannot be computed with"
                raise self._packed() or self.refuse(found)
            return reads[0] if len(reads) == 1 else Agree(reads, self)
        shape = self._same_shape(name, args, exact=not self.op.pads(**self.params))
        padded = [a if a is _ZERO or a.shape == shape else Padded(a, shape, self) for a in args]
        dtype = self._dtype(present)
        params = self._resolve(name)
        problem = self.op.check(len(self.inputs), **params)
        if problem:
            at = "" if self._constant else f" (at `{name}`)"
            key = next((p.name for p in self.op.params if p.name in self.given and p.name in problem), "")
            raise self.refuse(f"{self.op.name}: {problem}{at}", key=key)
        extra = {"depth": self._depth(name)} if "depth" in self.op.needs else {}
        known = [node.tensors.get(name) for node in self.statistics]
        if None in known:
            self.plain.append(name)
            coefs = [float(c) for c in self.op.without(len(args), **params)]
            kept = [(c, a) for c, a in zip(coefs, padded, strict=True) if a is not _ZERO]
            return weighted([c for c, _ in kept], [a for _, a in kept], shape, dtype, self)
        reduced = self.op.reduces(len(args), shape, extra.get("depth"), **params)
        if reduced is not None or (self.op.linear and not self._measured(params)):
            coefs = [float(c) for c in (reduced or self.op.function(len(args), **params, **extra))]
            kept = [(c, a) for c, a in zip(coefs, padded, strict=True) if a is not _ZERO]
            return weighted([c for c, _ in kept], [a for _, a in kept], shape, dtype, self)
        filled = [weighted([], [], shape, F32, self) if a is _ZERO else a for a in padded]
        key = f"{self.key}/{name}"
        if not known:
            return Applied(self.op, filled, params, shape, dtype, self, extra=extra, key=key)
        for i, statistic in enumerate(known, len(args)):
            problem = self.op.fits(shape, statistic.shape) if statistic is not None else None
            if problem:
                raise self.refuse(f"{self._name(i)}: `{name}`: {problem}", key="of")
        given = [s for s in known if s is not None]
        if self.op.locality != "matrix":
            return Applied(self.op, [*filled, *given], params, shape, dtype, self, extra=extra, key=key)
        return Informed(Applied(self.op, filled, params, shape, dtype, self, extra=extra, key=key), given)

    def _same_shape(self, name: str, args: list[Expr], *, exact: bool) -> tuple[int, ...]:
        present = [(i, a.shape) for i, a in enumerate(args) if a is not _ZERO]
        first, shape = present[0]
        for i, other in present[1:]:
            if other == shape:
                continue
            if not exact and len(other) == len(shape) > 0 and other[1:] == shape[1:]:
                shape = max(shape, other)
                continue
            message = (
                f"shapes differ for `{name}`: {_dims(present[0][1])} in {self._name(first)}, {_dims(other)} in {self._name(i)}"
            )
            hint = "all inputs must be the same architecture and size"
            if len(other) == len(shape) > 0 and other[1:] == shape[1:]:
                hint = "different vocabularies? align them: output: {tokenizer: union}, or the model whose tokenizer to take"
                hint += "; `diff` takes pad: true" if self.op.name == "diff" else ""
            raise self._packed() or self.refuse(message, hint=hint)
        return shape

    def _dtype(self, present: list[Expr]) -> DType:
        """Weights come out in the widest type among weights (a delta lends no type); deltas in float32 or wider."""
        if self.space == "delta":
            return F64 if any(a.dtype is F64 for a in present) else F32
        if self.op.takes.space_of(len(self.models) - 1) == "delta":
            return present[0].dtype
        made = present[0].dtype
        for a in present[1:]:
            made = promote(made, a.dtype)
        return made

    # -- parameters per tensor -------------------------------------------------------------------------------------------

    @cached_property
    def _constant(self) -> bool:
        return all(
            p.fixed or all(map(values.is_constant, v if p.per_input else [v]))
            for p in self.op.params
            for v in [self.params[p.name]]
        )

    @cached_property
    def _by_depth(self) -> bool:
        return any(
            not p.fixed and any(map(values.depends_on_depth, v if p.per_input else [v]))
            for p in self.op.params
            for v in [self.params[p.name]]
        )

    def _resolve(self, name: str) -> dict[str, Any]:
        if self._constant:
            return self.params
        position = self.inputs[0].structure.position(name) if self._by_depth else 0.0
        made = {}
        for p in self.op.params:
            value = self.params[p.name]
            if p.fixed:
                made[p.name] = value
            elif p.per_input:
                made[p.name] = [self._at(p, v, name, position) for v in value]
            else:
                made[p.name] = self._at(p, value, name, position)
        return made

    def _at(self, param: Any, value: Any, name: str, position: float) -> Any:
        found = values.at(value, name, position, param.default)
        if found is REQUIRED:
            raise self.refuse(f"no glob of `{param.name}` matches `{name}`", hint='end the map with "*"', key=param.name)
        return found

    def _depth(self, name: str) -> tuple[int, int] | None:
        block = self.inputs[0].structure.block(name)
        return None if block is None else (block[1], block[0].depth)

    def _check_globs(self, made: Mapping[str, Expr]) -> None:
        for p in self.op.params:
            value = self.params[p.name]
            for v in value if p.per_input else [value]:
                for glob in values.globs_in(v):
                    if not any(values.matches(glob, name) for name in made):
                        raise self.refuse(
                            f"`{p.name}`: no tensor matches `{glob}`", hint=did_you_mean(glob, made), key=p.name
                        )

    def _measured(self, params: Mapping[str, Any]) -> bool:
        return self.op.statistic is not None and self.op.statistic(len(self.inputs), [1], **params) is not None

    def _measure(self, expr: Applied, shared: Measure | None) -> Measure | None:
        """Attach the statistic `expr` needs, if any; one of global scope is shared by the whole node."""
        if not self._measured(expr.params):
            return shared
        scope = self.op.scope(**expr.params)
        measure = shared if scope == "global" and shared is not None else Measure(self.op, expr.params, scope)
        for name in _statistic_params(self.op) if measure is shared else ():
            if expr.params[name] != measure.params[name]:
                raise self.refuse(f"`{name}` cannot vary over the model where it is measured over all of it", key=name)
        expr.measure, expr.part = measure, len(measure.parts)
        measure.parts.append(expr)
        return measure if scope == "global" else shared

    # -- telling --------------------------------------------------------------------------------------------------------

    def _name(self, i: int) -> str:
        return self.inputs[i].label or f"input {i + 1}"

    def _packed(self) -> Exception | None:
        """The likely reason why models do not fit: one of them is quantised."""
        for source in (s.source for s in sources_of(self)):
            how = packing(source)
            if how is not None:
                return packed_codes(source, how, next(iter(source.tensors)))
        return None

    def _missing(self, absent: list[tuple[str, list[int]]]) -> Exception:
        name, lacking = absent[0]
        have = next(self._name(i) for i in range(len(self.inputs)) if i not in lacking)
        lacks = self._name(lacking[0])
        message = f"`{name}` is in {have} but not in {lacks}"
        if len(absent) > 1:
            message += f" (and {len(absent) - 1} more tensors, e.g. `{absent[-1][0]}`)"
        hint = "say what to do with such tensors: missing: keep (unchanged) or missing: skip (leave out)"
        if len(absent) > len(self.inputs[0].tensors) / 2:
            near = did_you_mean(name, self.inputs[lacking[0]].tensors)
            hint = f"the models name their tensors differently; {near or 'rename one of them'}"
        return self.refuse(message, hint=hint)

    def _unknown(self, made: Mapping[str, Expr]) -> Exception:
        node = next((n for n in self.statistics if not any(name in n.tensors for name in made)), self.statistics[0])
        hint = did_you_mean(next(iter(node.tensors), ""), made)
        return self.refuse(f"no tensor of the models has statistics in {node.label or 'every input'}", hint=hint, key="of")

    @cached_property
    def key(self) -> str:
        """What random numbers of this node are keyed on beside seed and tensor: the names of its sources."""
        return ",".join(dict.fromkeys(s.source.label for s in sources_of(self)))

    @property
    def text(self) -> str:
        names = " , ".join(n.label or n.verb.lower() for n in self.inputs).replace(" ,", ",")
        changed = [f"{k}={values.show(v)}" for k, v in self.given.items()]
        if self.plain:
            changed.append(f"(mean for {len(self.plain)} tensors without statistics)")
        return " ".join([names, *changed])

    @property
    def identity(self) -> str:
        random = self.key if any(p.name == "seed" for p in self.op.params) else ""
        return f"{sorted(self.params.items(), key=str)!r}\0{self.missing}\0{random}"


class _Marker:
    """Stands where an input has no expression for a tensor."""

    def __init__(self, name: str) -> None:
        self.name = name


_ABSENT: Any = _Marker("absent")
_ZERO: Any = _Marker("zero")


def _statistic_params(op: Op) -> list[str]:
    assert op.statistic is not None
    named = inspect.signature(op.statistic).parameters
    return [p.name for p in op.params if p.name in named]


def _what(node: Node) -> str:
    return {"weights": "weights", "statistics": "statistics", "mask": "a mask"}.get(node.space, "a delta")


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
