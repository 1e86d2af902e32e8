"""What is raced and checked: each operation as our recipe, and as the peer's where it has the same one.

An operation names the checkpoints it reads and the steps over them. `recipe` and `peer_config` write the
files that `surgery run` and `mergekit-yaml` are given, and nothing else here knows either language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDERS = {"base": "base", "m0": "ft0", "m1": "ft1", "m2": "ft2"}
"""Which checkpoint of a family (models.py) stands for which name in a recipe."""


@dataclass(frozen=True)
class Operation:
    """A merge: the inputs it reads, our steps (the last is `merged`), and the peer's method with its keys.

    Without steps of our own the peer's file is what we run too. `peer` holds what mergekit is told: its keys, and under
    `each` the parameters of the models other than the base, as one value for all or a list of one per model.
    """

    inputs: Sequence[str]
    steps: dict[str, dict]
    peer: dict | None = None

    def paths(self, models: Path) -> list[Path]:
        """Return the directories of the inputs."""
        return [models / FOLDERS[name] for name in self.inputs]


def operations(tuned: int = 3) -> dict[str, Operation]:
    """Return every operation by name, over that many fine-tunes where it takes any number.

    `dare_all` drops nothing: DARE without the dice, for checking its arithmetic.
    """
    models = [f"m{i}" for i in range(tuned)]
    tasks = [f"t{i}" for i in range(tuned)]
    diffs = {task: {"op": "diff", "of": [model, "base"]} for task, model in zip(tasks, models, strict=True)}
    add_task = {"merged": {"op": "add", "of": ["base", "task"]}}
    ties = {"op": "ties", "of": tasks, "density": 0.3}
    lines = {"op": "lines", "of": "t0", "alpha": 0.3, "beta": 1.0}

    def merged(op: str, of: Sequence[str], **keys) -> dict[str, dict]:
        return {"merged": {"op": op, "of": list(of), **keys}}

    def dare(density: float) -> Operation:
        keys = {"density": density, "rescale": "inverse"}
        drops = {f"d{i}": {"op": "dare", "of": t, **keys, "seed": i + 1} for i, t in enumerate(tasks)}
        steps = {**diffs, **drops, **merged("add", ["base", *drops], weight=[0.3] * tuned)}
        return Operation(["base", *models], steps, method("dare_linear", weight=0.3, density=density))

    def method(name: str, **each) -> dict:
        return {"merge_method": name, "each": each}

    return {
        "linear": Operation(models, merged("average", models), method("linear", weight=1.0)),
        "lerp": Operation(
            models[:2], merged("lerp", models[:2], alpha=0.25), method("linear", weight=[0.75, 0.25])
        ),
        "slerp": Operation(
            models[:2],
            merged("slerp", models[:2], t=0.4),
            {"merge_method": "slerp", "base_model": "m0", "parameters": {"t": 0.4}},
        ),
        "task_arithmetic": Operation(
            ["base", *models],
            {**diffs, **merged("add", ["base", *tasks], weight=[0.3] * tuned)},
            method("task_arithmetic", weight=0.3),
        ),
        "lines": Operation(
            ["base", "m0"],
            {"t0": diffs["t0"], "task": lines, **add_task},
            method("task_arithmetic", weight=[[0.3, 1.3]]),
        ),
        "stock": Operation(["base", *models], merged("stock", ["base", *models]), method("model_stock")),
        "ties": Operation(
            ["base", *models],
            {**diffs, "task": {**ties, "like": "mergekit"}, **add_task},
            method("ties", weight=1.0, density=0.3),
        ),
        "ties_global": Operation(["base", *models], {**diffs, "task": ties, **add_task}),
        "dare": dare(0.5),
        "dare_all": dare(1.0),
        "della": Operation(["base", *models], {}, method("della_linear", weight=0.3, density=0.5, epsilon=0.15)),
        "breadcrumbs": Operation(["base", *models], {}, method("breadcrumbs", weight=0.3, density=0.8, gamma=0.01)),
        "sce": Operation(["base", *models], {}, method("sce") | {"parameters": {"select_topk": 0.5}}),
        "karcher": Operation(models, {}, method("karcher")),
        "nuslerp": Operation(models[:2], {}, method("nuslerp", weight=0.5)),
        "multislerp": Operation(models, {}, method("multislerp", weight=0.3)),
    }


OPERATIONS = operations()
RACES = ("linear", "task_arithmetic", "slerp", "stock", "ties", "ties_global", "dare")
DIALECT = ("della", "breadcrumbs", "sce", "karcher", "nuslerp", "multislerp")  # the peer's own files, run by both


def recipe(operation: Operation, models: Path, file: Path) -> Path:
    """Write our recipe for an operation on a family of models, and return the file."""
    if not operation.steps:
        config = peer_config(operation, models, file)
        assert config is not None
        return config
    sources = {name: str(models / FOLDERS[name]) for name in operation.inputs}
    return write_recipe(file, sources, operation.steps)


def write_recipe(file: Path, models: dict[str, str], steps: dict[str, dict], dtype: str = "bfloat16") -> Path:
    """Write a recipe in the native language whose last step is called `merged`."""
    output = {"from": "merged", "dtype": dtype}
    return _dump(file, {"models": models, "steps": steps, "output": output})


def peer_config(operation: Operation, models: Path, file: Path) -> Path | None:
    """Write mergekit's configuration for an operation and return the file, None where it has no such one."""
    if operation.peer is None:
        return None
    shared = dict(operation.peer)
    each = shared.pop("each", {})
    where = {name: str(models / FOLDERS[name]) for name in operation.inputs}
    if "base" in where:
        shared["base_model"] = "base"
    if "base_model" in shared:
        shared["base_model"] = where[shared["base_model"]]
    entries = []
    for i, name in enumerate(n for n in operation.inputs if n != "base"):
        values = {key: v[i] if isinstance(v, list) else v for key, v in each.items()}
        entries.append({"model": where[name], **({"parameters": values} if values else {})})
    return _dump(file, {"models": entries, **shared, "dtype": "bfloat16"})


def _dump(file: Path, content: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.dump(content, Dumper=_Plain, sort_keys=False, default_flow_style=None, width=100))
    return file


class _Plain(yaml.SafeDumper):
    """A dumper that writes a value twice rather than as an anchor and its alias."""

    def ignore_aliases(self, data) -> bool:
        return True
