"""A lossy package without its base, as a delta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.checkpoint.dtypes import F32
from surgery.delta.container import Package
from surgery.delta.decode import decoded, held
from surgery.delta.manifest import Entry
from surgery.delta.reference import Array
from surgery.graph.expr import Derived, Expr, Fetch, Weighted
from surgery.graph.node import Node


class Decoded(Derived):
    """The delta of one lossy tensor."""

    __slots__ = ("entry", "package")

    def __init__(self, package: Package, entry: Entry, origin: Any) -> None:
        super().__init__([], entry.target.shape, F32, origin)
        self.package, self.entry = package, entry

    @property
    def identity(self) -> str:
        return f"{self.package.identity}/{self.entry.target.name}"

    @property
    def holds(self) -> int:  # type: ignore[override]
        return held(self.entry)

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        return decoded(self.package, self.entry, start, stop).astype(work, copy=False)


class DeltaNode(Node):
    """The float tensors of a lossy package as what is to be added to the base's.

    Tensors as in the base are zero; integers and flags as in the base are left out, which means the same. Those that are
    carried exactly cannot be had without the base: refused, and named.
    """

    space = "delta"
    verb = "PACKAGE"

    def __init__(self, package: Package, label: str | None = None, where: Mapping[str, str] | None = None) -> None:
        super().__init__(label or package.label, where)
        self.package = package

    def _build(self) -> dict[str, Expr]:
        made: dict[str, Expr] = {}
        exact = []
        for name, entry in self.package.one().entries.items():
            if entry.lossy and entry.residual is None:
                made[name] = Decoded(self.package, entry, self)
            elif entry.same and entry.base is not None and entry.base.name == name:
                if entry.target.dtype.is_float:  # others: `left_out`
                    made[name] = Weighted([], [], entry.target.shape, F32, self)
            else:
                exact.append(name)
        if exact:
            count = "1 tensor" if len(exact) == 1 else f"{len(exact)} tensors"
            raise self.refuse(
                f"{self.package.path}: {count} (`{exact[0]}`{', …' if exact[1:] else ''}) carried exactly: that needs the base",
                hint="name it: {source: PACKAGE, base: BASE} in recipes, surgery.open(package, base=...) in Python; "
                'or pack with --only "*"',
            )
        return made

    @property
    def left_out(self) -> set[str]:
        entries = self.package.one().entries
        return {n for n, e in entries.items() if e.same and not e.target.dtype.is_float}

    @property
    def text(self) -> str:
        return f"{self.label} (lossy delta)"

    @property
    def identity(self) -> str:
        return self.package.identity
