"""Editing a checkpoint: choosing, renaming, retyping, replacing and reordering tensors. Each gives a new lazy checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from surgery.checkpoint import config as configs
from surgery.checkpoint.dtypes import DType, float_dtype
from surgery.checkpoint.structure import Tower, layers_renamed
from surgery.errors import did_you_mean
from surgery.graph.expr import Expr, Mapped, Rounded
from surgery.graph.node import Everywhere, Node
from surgery.graph.values import matches


class EditNode(Node):
    """Base of nodes with one input whose space they keep."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.label)
        self.inputs = (node,)
        self.space = node.space

    def matching(self, globs: Sequence[str]) -> set[str]:
        """Names of the input's tensors that any glob matches. Raises Refused for a glob without a match."""
        names = self.inputs[0].tensors
        found: set[str] = set()
        for glob in globs:
            hits = [n for n in names if matches(glob, n)]
            if not hits:
                raise self.refuse(f"{self.verb.lower()}: no tensor matches `{glob}`", hint=did_you_mean(glob, names))
            found.update(hits)
        return found


class SelectNode(EditNode):
    """Only the tensors that match any of `globs` (all but those, with drop)."""

    def __init__(self, node: Node, globs: Sequence[str], *, drop: bool = False) -> None:
        super().__init__(node)
        self.globs, self.drop = tuple(globs), drop
        self.verb = "DROP" if drop else "SELECT"

    def _build(self) -> dict[str, Expr]:
        hits = self.matching(self.globs)
        reason = f"dropped by {', '.join(self.globs)}" if self.drop else f"not selected by {', '.join(self.globs)}"
        tensors = self.inputs[0].tensors
        self.dropped = {n: reason for n in tensors if (n in hits) == self.drop}
        return {n: e for n, e in tensors.items() if n not in self.dropped}

    @cached_property
    def left_out(self) -> set[str]:
        below = self.inputs[0].left_out
        return below if isinstance(below, Everywhere) else set(below) | (self.inputs[0].tensors.keys() - self.tensors.keys())

    @property
    def text(self) -> str:
        return " ".join(self.globs)


class RenameNode(EditNode):
    """New names: a map old -> new, or a function of the name."""

    verb = "RENAME"

    def __init__(self, node: Node, names: Mapping[str, str] | Callable[[str], str]) -> None:
        super().__init__(node)
        self.names = names

    def _build(self) -> dict[str, Expr]:
        tensors = self.inputs[0].tensors
        if isinstance(self.names, Mapping):
            for old in self.names:
                if old not in tensors:
                    raise self.refuse(f"rename: there is no tensor `{old}`", hint=did_you_mean(old, tensors))
        made: dict[str, Expr] = {}
        for old, expr in tensors.items():
            new = self.names.get(old, old) if isinstance(self.names, Mapping) else self.names(old)
            if new in made:
                raise self.refuse(f"rename: two tensors would be called `{new}`")
            made[new] = expr
        return made

    @cached_property
    def left_out(self) -> set[str]:
        names = self.names
        if isinstance(self.inputs[0].left_out, Everywhere):
            return self.inputs[0].left_out
        return {names.get(n, n) if isinstance(names, Mapping) else names(n) for n in self.inputs[0].left_out}

    @property
    def identity(self) -> str:
        return "\n".join(self.tensors)

    @property
    def text(self) -> str:
        return f"{len(self.names)} tensors" if isinstance(self.names, Mapping) else _function_name(self.names)


class CastNode(EditNode):
    """Matching float tensors rounded to another type."""

    verb = "CAST"

    def __init__(self, node: Node, dtype: str, globs: Sequence[str]) -> None:
        super().__init__(node)
        self.dtype: DType = float_dtype(dtype)
        self.globs = tuple(globs)

    def _build(self) -> dict[str, Expr]:
        hits = self.matching(self.globs)
        return {
            n: Rounded(e, self.dtype, self) if n in hits and e.dtype.is_float and e.dtype != self.dtype else e
            for n, e in self.inputs[0].tensors.items()
        }

    @property
    def text(self) -> str:
        return f"{self.dtype} {' '.join(self.globs)}"


class ReplaceNode(EditNode):
    """Some tensors replaced, or added."""

    verb = "REPLACE"

    def __init__(self, node: Node, new: Mapping[str, Expr], others: Sequence[Node] = ()) -> None:
        super().__init__(node)
        self.new = dict(new)
        self.inputs = (node, *others)

    def _build(self) -> dict[str, Expr]:
        tensors = self.inputs[0].tensors
        self.dropped = {n: "replaced" for n in self.new if n in tensors}
        return {**tensors, **self.new}

    @property
    def identity(self) -> str:
        from surgery.graph.literal import token

        return "\n".join(f"{n}={token(e)}" for n, e in self.new.items())

    @property
    def text(self) -> str:
        return " ".join(list(self.new)[:3]) + (" …" if len(self.new) > 3 else "")


class MapNode(EditNode):
    """A user's function on whole matching tensors: f(tensor) or f(name, tensor) -> tensor of the same shape."""

    verb = "MAP"

    def __init__(self, node: Node, function: Callable[..., Any], globs: Sequence[str]) -> None:
        super().__init__(node)
        self.function, self.globs = function, tuple(globs)

    def _build(self) -> dict[str, Expr]:
        hits = self.matching(self.globs)
        return {
            n: Mapped(self.function, e, n, self) if n in hits else e for n, e in self.inputs[0].tensors.items()
        }

    @property
    def identity(self) -> str:
        code = getattr(self.function, "__code__", None)
        if code is None:
            return f"{self.text}\0{self.function!r}"
        cells = [c.cell_contents for c in self.function.__closure__ or ()]
        state = repr((code.co_consts, self.function.__defaults__, self.function.__kwdefaults__, cells))
        return f"{self.text}\0{hashlib.sha256(code.co_code + state.encode()).hexdigest()}"

    @property
    def text(self) -> str:
        return f"{_function_name(self.function)} {' '.join(self.globs)}"


class LayersNode(EditNode):
    """Blocks of one tower kept, dropped, repeated or reordered; names renumbered, config's layer counts made true."""

    verb = "LAYERS"

    def __init__(self, node: Node, tower: Tower, keep: Sequence[int]) -> None:
        super().__init__(node)
        self.tower, self.keep = tower, tuple(keep)

    def _build(self) -> dict[str, Expr]:
        tensors = self.inputs[0].tensors
        source = layers_renamed(list(tensors), self.tower, self.keep)
        kept = set(source.values())
        self.dropped = {n: f"block not kept of {self.tower.prefix}" for n in tensors if n not in kept}
        return {new: tensors[old] for new, old in source.items()}

    @cached_property
    def left_out(self) -> set[str]:
        below = self.inputs[0].left_out
        if isinstance(below, Everywhere):
            return below
        renamed = layers_renamed([*self.inputs[0].tensors, *sorted(below)], self.tower, self.keep)
        return {new for new, old in renamed.items() if old in below}

    @property
    def config(self) -> dict[str, Any] | None:
        config = self.inputs[0].config
        return config and configs.with_layers(config, self.tower.depth, self.keep, self.tower.prefix)

    @property
    def text(self) -> str:
        return f"{self.tower.prefix} {list(self.keep)}"


def _function_name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


