"""Sweeps that write their recipe themselves: the path from a base to its fine-tune, LiNeS, soups, learned merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.lab import best
from surgery.lab.dimensions import Dimension, Refuse

Beside = Callable[[str], str]


def named(said: Any, beside: Beside) -> dict[str, str]:
    """name -> location, of a map or a list of paths."""
    given = said if isinstance(said, dict) else _unique([str(m) for m in said])
    return {name: beside(str(place)) for name, place in given.items()}


def places(said: Mapping[str, Any], beside: Beside) -> list[str]:
    """All models that a preset names."""
    made = [beside(said[key]) for key in ("base", "tuned") if key in said]
    return made + (list(named(said["models"], beside).values()) if "models" in said else [])


def _unique(given: Sequence[str]) -> dict[str, str]:
    made: dict[str, str] = {}
    for place in given:
        name = stem = Path(place).name
        number = 2
        while name in made:
            name, number = f"{stem}-{number}", number + 1
        made[name] = place
    return made


def read_wise(said: Mapping[str, Any], refuse: Refuse) -> list[Dimension]:
    """The path from a base to its fine-tune (WiSE-FT), alpha from 0 to 1."""
    _known("wise", said, ("base", "tuned", "points"), refuse)
    points = said.get("points", 11)
    if not all(isinstance(said.get(k), str) for k in ("base", "tuned")) or not isinstance(points, int) or points < 2:
        raise refuse("wise needs two paths, `base` and `tuned`, and at least 2 `points`", "wise")
    return [Dimension("steps.wise.alpha", 0.0, 1.0, values=tuple(i / (points - 1) for i in range(points)))]


def read_lines(said: Mapping[str, Any], refuse: Refuse) -> list[Dimension]:
    """LiNeS (Wang et al. 2024). One task: alpha from 1 down to 0, beta = 1 - alpha, so that of equals the largest alpha,
    closest to the fine-tune, is taken. Several: alpha from the norms of the deltas, beta from 0.1 to 1."""
    _known("lines", said, ("base", "tuned", "models", "points"), refuse)
    points = said.get("points", 11 if "tuned" in said else 10)
    paths = said.get("models")
    listed = list(paths.values()) if isinstance(paths, dict) else paths
    several = isinstance(listed, list) and len(listed) > 1 and all(isinstance(m, str) for m in listed)
    if not isinstance(said.get("base"), str) or isinstance(said.get("tuned"), str) == several or points < 2:
        raise refuse("lines needs `base`, either `tuned` (a path) or `models` (two or more), and at least 2 `points`", "lines")
    if several:
        return [Dimension("steps.scaled.beta", 0.0, 1.0, values=tuple((i + 1) / points for i in range(points)))]
    down = tuple(round(1.0 - i / (points - 1), 12) for i in range(points))
    return [Dimension("steps.scaled.alpha", 0.0, 1.0, values=down)]


def _known(key: str, said: Mapping[str, Any], keys: Sequence[str], refuse: Refuse) -> None:
    for k in said:
        if k not in keys:
            raise refuse(f"unknown key `{k}` in {key}", key, k, hint=f"it takes {', '.join(keys)}")
    if isinstance(said.get("points", 2), bool) or not isinstance(said.get("points", 2), int):
        raise refuse(f"{key}: points must be a whole number", key, "points")


def write_recipes(search: Any, folder: Path) -> tuple[Path, Path]:
    """The recipe that trials vary, written first where the method makes its own; and that of single members."""
    recipe = members = folder / "recipe.yaml"
    said = search.said
    if search.recipe is not None:
        return search.recipe, search.recipe
    if "wise" in said:
        text = best.path_recipe(search.beside(said["wise"]["base"]), search.beside(said["wise"]["tuned"]), folder)
    elif "lines" in said:
        given = said["lines"]
        tuned = {"tuned": search.beside(given["tuned"])} if "tuned" in given else named(given["models"], search.beside)
        text = best.lines_recipe(search.beside(given["base"]), tuned, folder)
    elif search.method == "graft":
        text = best.graft_recipe(search.beside(said["base"]), search.beside(said["tuned"]), folder, bool(search.learn.whole))
    elif search.method == "adamerging":
        text = best.sum_recipe(search.beside(said["base"]), search.models(), search.learn.trim, folder)
    else:
        models = search.models()
        text = best.mix_recipe(models, "average", {"weight": [1] * len(models)}, folder)
        if search.method == "lm_cocktail":
            members = folder / "members.yaml"
            members.write_text(text, "utf-8")
            mixed = {"loss": [0.0] * len(models), "temperature": float(said.get("temperature", 5.0))}
            text = best.mix_recipe(models, "lm_cocktail", mixed, folder)
    recipe.write_text(text, "utf-8")
    return recipe, members
