"""Packages as inputs: on their base they are checkpoints, alone (where they are lossy) deltas."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.delta.alone import DeltaNode
from surgery.delta.container import Package, is_package
from surgery.delta.rebuild import PackageNode
from surgery.errors import Refused
from surgery.graph.node import Node


def package(location: str, label: str | None, where: Mapping[str, str]) -> Node | None:
    """A kind of input: a package without its base. None where `location` is no package. Raises Refused for an exact one."""
    if not is_package(location):
        return None
    found = Package(location)
    found.one()
    if found.mode in ("exact", "progressive"):
        raise Refused(
            f"{location}: is an exact package: its numbers mean something only together with its base",
            hint="name the base: {source: PACKAGE, base: BASE} in recipes, surgery.open(package, base=...) in Python",
        )
    return DeltaNode(found, label, where)


def on_base(location: str, base: Node, *, label: str | None = None, where: Mapping[str, str] | None = None) -> PackageNode:
    """The checkpoint that a package makes of its base. Raises Refused for another base, as far as headers tell."""
    if not is_package(location):
        raise Refused(f"{location}: is no delta package; only packages have a base", hint="open it without `base`")
    return PackageNode(Package(location), base, label, where)
