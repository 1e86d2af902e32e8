"""Content tokens of single tensors: equal for equal computations, so that what has not changed is not computed again.

`Node.token` speaks of whole checkpoints; one changed coefficient changes it for all tensors. These tokens follow each tensor's
own expression: a glob map that changes one block's coefficient leaves the tokens of all other blocks as they were.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

from surgery.engine.plan import Program
from surgery.graph.expr import Applied, Derived, Expr, Literal, Mapped, Measure, Padded, Read, Rounded, Weighted, walk


class Tokens:
    """Tokens of expressions and measures, each computed once. Valid for as long as the expressions live."""

    def __init__(self) -> None:
        self._of: dict[int, str] = {}
        self._measures: dict[int, str] = {}

    def program(self, program: Program) -> str:
        """What decides the bytes of an output tensor."""
        return _hash("program", self(program.expr), program.dtype.name, program.wide)

    def __call__(self, expr: Expr) -> str:
        if id(expr) not in self._of:
            for e in walk([expr]):
                if id(e) not in self._of:
                    self._of[id(e)] = self._token(e)
        return self._of[id(expr)]

    def measure(self, measure: Measure) -> str:
        """What decides a statistic: the parameters that it is given, and everything it is taken over."""
        known = self._measures.get(id(measure))
        if known is None:
            assert measure.op.statistic is not None
            named = inspect.signature(measure.op.statistic).parameters
            said = sorted((k, v) for k, v in measure.params.items() if k in named or _takes_all(named, measure.op.params, k))
            parts = [(p.key, p.shape, sorted(p.extra.items()), [self(a) for a in p.args]) for p in measure.parts]
            known = self._measures[id(measure)] = _hash("measure", measure.op.name, measure.scope, said, parts)
        return known

    def _token(self, e: Expr) -> str:
        args = [self._of[id(a)] for a in e.args]
        common = type(e).__name__, e.shape, e.dtype.name, args
        if isinstance(e, Read):
            state = e.source.files[e.stored.path]
            return _hash(*common, e.stored, state.size, state.mtime_ns)
        if isinstance(e, Literal):
            import torch

            return _hash(*common, hashlib.sha256(e.tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest())
        if isinstance(e, Weighted):
            return _hash(*common, [float(c).hex() for c in e.coefs])
        if isinstance(e, Mapped):
            return _hash(*common, id(e.function), e.tensor_name)  # whoever keeps the token keeps the expression
        if isinstance(e, Applied):
            measured = None if e.measure is None else (self.measure(e.measure), e.part)
            return _hash(*common, e.op.name, sorted(e.params.items()), sorted(e.extra.items()), e.key, measured)
        if isinstance(e, Derived):
            return _hash(*common, type(e).__module__, e.identity)
        return _hash(*common) if isinstance(e, Padded | Rounded) else _hash(*common, "agree")


def _takes_all(named: Any, params: Any, key: str) -> bool:
    """True if a statistic with `**kwargs` might look at the parameter `key`. It is given all of them."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD and not p.name.startswith("_") for p in named.values())


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
