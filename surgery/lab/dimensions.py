"""The numbers that trials differ in: values of the recipe by dotted key, listed, in a range, or one for each block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean

_RANGE = ("low", "high", "step", "log", "points", "per")
OUTSIDE = "*"  # the glob of a map over blocks that holds for all other tensors
Refuse = Callable[..., Refused]


@dataclass(frozen=True)
class Dimension:
    """One number of the recipe that trials differ in. values: all there are, if they can be listed.

    slot: where the number lies inside of the value at `key`: a glob of a map, or the position in a gradient over depth.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    values: tuple[Any, ...] | None = None
    listed: bool = False  # values were given one by one: they need not be numbers
    slot: str | int | None = None

    @property
    def name(self) -> str:
        """What trials call it."""
        return self.key if self.slot is None else f"{self.key}[{self.slot}]"

    @property
    def whole(self) -> bool:
        """True for a dimension of integers."""
        return all(isinstance(v, int) for v in (self.low, self.high)) and (self.step is None or isinstance(self.step, int))

    def distribution(self) -> Any:
        """As optuna calls it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.listed:
            return CategoricalDistribution(self.values or ())
        if self.whole and self.values is None:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        if self.whole and isinstance(self.step, int):
            return IntDistribution(int(self.low), int(self.high), step=self.step)
        return FloatDistribution(float(self.low), float(self.high), step=self.step, log=self.log)


def overrides(dimensions: Sequence[Dimension], params: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial's numbers set in the recipe: those of one value are put together to a map or a gradient."""
    made: dict[str, Any] = {}
    known = {d.name: d for d in dimensions}
    for name, value in params.items():
        d = known.get(name)
        if d is None or d.slot is None:
            made[name] = value
        elif isinstance(d.slot, int):
            made.setdefault(d.key, []).append(value)
        else:
            made.setdefault(d.key, {})[d.slot] = value
    return made


def read_dimensions(said: Mapping[str, Any], method: str, recipe: Path | None, refuse: Refuse) -> list[Dimension]:
    """The `dimensions` of a sweep file."""
    if not said.get("dimensions"):
        raise refuse("a sweep needs `dimensions`", hint="dimensions: {steps.merged.weight: {low: 0.0, high: 1.0, step: 0.1}}")
    made: list[Dimension] = []
    for key, value in said["dimensions"].items():

        def wrong(message: str, k: str = key, **more: Any) -> Refused:
            return refuse(message, "dimensions", k, **more)

        one = _dimension(key, value, method, wrong)
        per = value.get("per") if isinstance(value, dict) else None
        if per is None:
            made.append(one)
        elif isinstance(per, int):
            made += [replace(one, slot=i) for i in range(per)]
        else:
            made += [replace(one, slot=glob) for glob in _blocks(key, recipe, wrong)]
    if method == "cmaes" and (len(made) < 2 or any(d.listed for d in made)):
        raise refuse(
            "cmaes searches two or more numeric ranges", "dimensions", hint="method: tpe takes lists and single ranges"
        )
    return made


def _blocks(key: str, recipe: Path | None, refuse: Refuse) -> list[str]:
    """A glob for each block of the recipe's model, and the one for everything else."""
    from surgery.recipe.native import read_recipe

    assert recipe is not None
    towers = read_recipe(recipe, {}).node.structure.towers
    if not towers:
        raise refuse(f"`{key}`: per: block, but the model of {recipe} has no blocks", hint="leave per out")
    deepest = max(towers, key=lambda t: t.depth)
    return [f"{block}.*" for block in deepest.blocks] + [OUTSIDE]


def _dimension(key: str, value: Any, method: str, refuse: Refuse) -> Dimension:
    if isinstance(value, list):
        if not value or (method != "grid" and any(isinstance(v, dict | list) for v in value)):
            raise refuse(f"`{key}` needs a list of plain values")
        return Dimension(key, values=tuple(value), listed=True)
    if not isinstance(value, dict):
        raise refuse(f"`{key}` must be a list of values or {{low, high, step}}, got {value!r}")
    for k, v in value.items():
        if k not in _RANGE:
            raise refuse(f"`{key}`: unknown key `{k}`", hint=did_you_mean(k, _RANGE))
        if k == "per":
            if v != "block" and (not isinstance(v, int) or isinstance(v, bool) or v < 2):
                raise refuse(f"`{key}`: per must be `block`, or how many numbers a gradient over depth has (2 or more)")
        elif isinstance(v, bool) != (k == "log") or not isinstance(v, int | float) or not math.isfinite(v):
            raise refuse(f"`{key}`: {k} cannot be {v!r}")
    if "low" not in value or "high" not in value or not value["low"] < value["high"]:
        raise refuse(f"`{key}` needs low and high, low below high")
    low, high, step, log = value["low"], value["high"], value.get("step"), value.get("log", False)
    points = value.get("points")
    if log and (low <= 0 or step is not None):
        raise refuse(f"`{key}`: a log range needs low above 0 and takes no step")
    if step is not None and (step <= 0 or points is not None):
        raise refuse(f"`{key}`: step must be above 0, and goes without points")
    if points is not None and (not isinstance(points, int) or points < 2):
        raise refuse(f"`{key}`: points must be at least 2")
    if method == "grid" and step is None and points is None:
        raise refuse(f"`{key}`: a grid needs `step` or `points`")
    return Dimension(key, low, high if step is None else _listed(low, high, step)[-1], step, log,
                     _values(low, high, step, log, points))  # fmt: skip


def _values(low: float, high: float, step: float | None, log: bool, points: int | None) -> tuple[Any, ...] | None:
    if step is not None:
        return _listed(low, high, step)
    if points is not None and log:
        return tuple(math.exp(math.log(low) + i * (math.log(high) - math.log(low)) / (points - 1)) for i in range(points))
    return None if points is None else tuple(low + i * (high - low) / (points - 1) for i in range(points))


def _listed(low: float, high: float, step: float) -> tuple[Any, ...]:
    count = int((high - low) / step * (1 + 1e-12) + 1e-9) + 1
    plain = isinstance(low, int) and isinstance(step, int)
    return tuple(low + i * step if plain else round(low + i * step, 12) for i in range(count))
