"""Operators: pure functions on tensors, one family per file. Imported as `surgery.ops`.

`surgery.ops.NAME` is the operator of that name, callable on tensors and on checkpoints. Packages add their own through the
entry-point group `surgery.ops`: each entry point names a module whose import registers operators.
"""

from importlib.metadata import entry_points
from typing import Any

if __name__ != "surgery.ops":
    raise ImportError("import `surgery.ops`; the folder `ops/` is part of the package `surgery` (see pyproject.toml)")

from surgery.ops import (  # noqa: F401
    arithmetic,
    average,
    breadcrumbs,
    cart,
    cocktail,
    consensus,
    della,
    elect,
    emr,
    fisher,
    fusion,
    graft,
    interpolate,
    intruders,
    isotropic,
    knots,
    lines,
    localize,
    magmax,
    median,
    nearswap,
    pcb,
    ram,
    regmean,
    reset,
    sce,
    sparsify,
    spherical,
    stitch,
    stock,
    svc,
    ties,
    transfer,
    truncate,
    tsv,
    wudi,
)
from surgery.ops.declare import Op, registry

for _entry in entry_points(group="surgery.ops"):
    _entry.load()


def get(name: str) -> Op | None:
    """The operator called `name` in recipes, or None."""
    return registry.get(name)


def __getattr__(name: str) -> Any:
    op = registry.get(name.removesuffix("_"))
    if op is None:
        raise AttributeError(f"no operator `{name}`; surgery.ops.registry lists them")
    return op


# Submodules and operators share names (`ties`, `lines`, …); as attributes of the package the operators win.
for _op in registry.values():
    globals()[_op.name] = _op
