"""Several packages as one: chains, and sums of changes of the same base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.delta.codecs.base import Coded
from surgery.delta.container import Package
from surgery.delta.lossy.summed import Summed, Term, joined
from surgery.delta.manifest import Entry, Tensor
from surgery.delta.pack import Choice, Choose
from surgery.delta.rebuild import PackageNode
from surgery.errors import Refused
from surgery.graph.apply import OpNode
from surgery.graph.node import Node


def chain(packages: Sequence[Package], base: Node) -> Node:
    """What the packages make, each of what the one before it makes."""
    node = base
    for package in packages:
        node = PackageNode(package, node)
    return node


def total(packages: Sequence[Package], base: Node, weights: Sequence[float] | None) -> tuple[Node, Choose | None]:
    """(base and the weighted sum of what every package changes in it, how its tensors are coded).

    Tensors that all packages code with losses (or leave as they are) keep their codes; None where no tensor does. Others are to
    be carried exactly. Raises Refused for packages of other bases, and for weights that do not go with them.
    """
    from surgery.ops import registry

    factors = [1.0] * len(packages) if weights is None else list(weights)
    if len(factors) != len(packages):
        hint = "once for each, or not at all"
        raise Refused(f"--weight is given {len(factors)} times for {len(packages)} packages", hint=hint)
    nodes = [PackageNode(package, base) for package in packages]
    names = set(base.tensors)
    for node in nodes:
        if set(node.tensors) != names:
            other = sorted(set(node.tensors) ^ names)[0]
            raise Refused(
                f"{node.package.path}: `{other}` is not in base and model alike: changes of it cannot be added",
                hint="sums are of packages that keep the base's tensors",
            )
    made: Node = base
    for node, factor in zip(nodes, factors, strict=True):
        delta = OpNode(registry["diff"], [node, base], {})
        made = OpNode(registry["add"], [made, delta], {"weight": factor})
    kept: dict[str, Choice] = {}
    for name in base.tensors:
        entries = [node.manifest.entries.get(name) for node in nodes]
        if all(e is not None and (e.same or _keeps(e)) for e in entries) and any(e is not None and e.lossy for e in entries):
            pairs = zip(entries, nodes, factors, strict=True)
            terms = [_term(node.package, e, factor) for e, node, factor in pairs if e is not None and e.lossy]
            kept[name] = _Kept(joined(terms)), {}
    if not kept:
        return made, None

    def choose(tensor: Tensor) -> Choice | None:
        return kept.get(tensor.name)

    return made, choose


def _keeps(entry: Entry) -> bool:
    """Whether a tensor's codes can stand in a sum as they are."""
    base = entry.base
    whole = entry.lossy and not entry.masked and entry.residual is None
    return whole and base is not None and (base.name, base.dtype) == (entry.target.name, entry.target.dtype)


def _term(package: Package, entry: Entry, weight: float) -> Term:
    layer = entry.layer
    assert layer is not None
    return Term(layer["codec"], layer["key"], weight, Coded(package.payload(tuple(entry.coded())), layer["facts"]))


class _Kept(Summed):
    """A sum that is known already: the delta that it is asked to code is what it decodes to, but for rounding."""

    streams = True

    def __init__(self, coded: Coded) -> None:
        self._coded = coded

    def pack(self, x: Any, key: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        facts: Mapping[str, Any] = self._coded.facts
        return dict(self._coded.parts), dict(facts)
