"""Tasks as data: what `tasks.yaml` says, checked, and read into tasks that can be run on a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from surgery.errors import Refused, did_you_mean
from surgery.lab import corrupt, measures
from surgery.lab.measures import Measure
from surgery.lab.outcome import Labelled, Language, Outcome, Scored
from surgery.lab.subject import Subject

SPLITS = ("train", "validation", "test")  # sweeps that learn by gradients learn from train; nothing is reported of it
_COMMON = {
    "kind": str, "train": (str, dict, list),
    "validation": (str, dict, list), "test": (str, dict, list), "measures": list, "limit": int, "batch": int,
    "corruptions": (list, dict), "shift_of": str,
}  # fmt: skip


@dataclass
class Task:
    """Base of all kinds. splits: name -> what the file says of it. said: the task's own keys, complete.

    Subclasses read examples once per split and tokenizer, and keep them.
    """

    name: str
    said: Mapping[str, Any]
    folder: Path = field(default_factory=Path)
    where: str = ""

    KEYS: ClassVar[Mapping[str, Any]] = {}  # of the kind, and their types
    OUTCOME: ClassVar[type] = Labelled
    CORRUPTED: ClassVar[str | None] = None  # "images" or "texts": what its examples are to corruptions

    corruption: tuple[str, Mapping[str, float]] | None = None  # name and parameters, of a task that another one gave rise to

    def __post_init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def validate(self) -> None:
        """Refuse keys that do not go together."""

    @property
    def what(self) -> str:
        """The task in messages."""
        place = f"{self.where}: " if self.where else ""
        return f"{place}task `{self.name}` ({self.said['kind']})"

    @property
    def splits(self) -> list[str]:
        return [s for s in SPLITS if s in self.said]

    @property
    def measures(self) -> Mapping[str, Measure]:
        """The measures that it can give."""
        return measures.table_of(self.OUTCOME)

    def measure(self, name: str) -> Measure:
        """One of them. Raises Refused."""
        return measures.find(name, self.OUTCOME, self.what)

    @property
    def compares_tokens(self) -> bool:
        """True if the reference has to be alive beside the model."""
        return self.OUTCOME is Language and (self.wanted is None or bool({"kl", "agreement"} & set(self.wanted)))

    @property
    def wanted(self) -> list[str] | None:
        """The measures that the file names, or None for all that the task can give."""
        return self.said.get("measures")

    @property
    def family(self) -> str:
        """The task whose examples these are, shifted or as they are: families are resampled alike."""
        if self.corruption is not None:
            return self.name.rpartition("+")[0]
        return str(self.said.get("shift_of", self.name))

    @property
    def variants(self) -> list[Task]:
        """The same task under each of its `corruptions`."""
        made = []
        for name, options in (
            corrupt.chosen(self.said["corruptions"], self.CORRUPTED) if "corruptions" in self.said else {}
        ).items():
            said = {k: v for k, v in self.said.items() if k != "corruptions"}
            made.append(dataclasses.replace(self, name=f"{self.name}+{name}", said=said, corruption=(name, options)))
        return made

    def corrupted(self, values: Any) -> Any:
        """Images or texts as this task is to show them to the model."""
        return values if self.corruption is None else corrupt.corrupted(values, *self.corruption)

    def place(self, split: str) -> tuple[Path, str | None]:
        """Path of a split's data, and the split's name inside of a data set. Raises Refused."""
        said = self.said.get(split)
        if said is None:
            other = [s for s in SPLITS if s in self.said]
            raise Refused(f"{self.what} has no {split} split", hint=f"it has {', '.join(other)}")
        if isinstance(said, dict):
            return self.beside(said.get("path", "")), said.get("split")
        if isinstance(said, list):
            raise Refused(f"{self.what}: {split} must be a single file")
        return self.beside(said), None

    def beside(self, path: str) -> Path:
        """Paths are relative to the file that names them."""
        return self.folder / Path(os.path.expanduser(path))

    def run(self, subject: Subject, split: str) -> Outcome:
        """What the model makes of every example. Raises Refused."""
        raise NotImplementedError

    def once(self, key: Any, make: Any) -> Any:
        """`make()` the first time, what it made after that."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def refuse(self, message: str, *, hint: str | None = None) -> Refused:
        return Refused(f"{self.what}: {message}", hint=hint)


def read_tasks(path: str | os.PathLike[str]) -> list[Task]:
    """Read a tasks file. Raises Refused with file:line:col."""
    from surgery.recipe.document import Document

    document = Document(Path(path))
    data = document.data
    if not isinstance(data, dict) or not isinstance(data.get("tasks"), dict) or not data["tasks"]:
        raise Refused(f"{path}: not a tasks file (expected `tasks:` with a map of tasks)")
    for key in data:
        if key not in ("tasks", "defaults"):
            raise Refused(f"{document.place(key)}: unknown key `{key}`", hint=did_you_mean(key, ["tasks", "defaults"]))
    defaults = data.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise Refused(f"{document.place('defaults')}: must be a map")
    made = []
    for name, said in data["tasks"].items():
        if not isinstance(said, dict):
            raise Refused(f"{document.place('tasks', name)}: a task is a map with a `kind`")
        places = {key: document.place("tasks", name, key) for key in ("", *said)} | {"": document.place("tasks", name)}
        made.append(make_task(name, said, defaults=defaults, folder=document.path.parent, where=places))
    made = expanded(made)
    for task in made:
        other = next((t for t in made if t.name == task.family), None)
        if other is None:
            names = [t.name for t in made]
            raise Refused(f"{task.what}: `shift_of` names no task `{task.family}`", hint=did_you_mean(task.family, names))
        if other.OUTCOME is not task.OUTCOME or other.family != other.name:
            raise Refused(f"{task.what} cannot be a shift of `{other.name}`, a {other.said['kind']}")
    unused = [k for k in defaults if not any(k in _COMMON or k in t.KEYS for t in made)]
    if unused:
        raise Refused(f"{document.place('defaults', unused[0])}: no task here knows `{unused[0]}`")
    return made


def make_task(
    name: str,
    said: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] = ".",
    where: Mapping[str, str] | None = None,
) -> Task:
    """One task from its keys, as the file has them. where: key or "" -> place in messages. Raises Refused."""
    kinds, where = _kinds(), where or {}

    def refuse(message: str, key: str = "", hint: str | None = None) -> Refused:
        place = where.get(key) or where.get("")
        return Refused(f"{place}: {message}" if place else f"task `{name}`: {message}", hint=hint)

    kind = said.get("kind")
    if kind not in kinds:
        problem = "needs a `kind`" if kind is None else f"there is no kind of task `{kind}`"
        raise refuse(problem, "kind", did_you_mean(str(kind), kinds) or f"known: {', '.join(kinds)}")
    made_by = kinds[kind]
    known = {**_COMMON, **made_by.KEYS}
    for key, value in said.items():
        if key not in known:
            raise refuse(f"{kind} has no key `{key}`", key, did_you_mean(key, known))
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is int):
            raise refuse(f"`{key}` cannot be {value!r}", key)
    if not any(split in said for split in SPLITS) and made_by.OUTCOME is not Scored:
        raise refuse("needs data: `validation`, `test`, or both")
    complete = {k: v for k, v in (defaults or {}).items() if k in known} | dict(said)
    for key in ("limit", "batch", "length"):
        if isinstance(complete.get(key), int) and complete[key] < 1:
            raise refuse(f"`{key}` must be at least 1", key)
    for measure in complete.get("measures") or ():
        measures.find(str(measure), made_by.OUTCOME, f"{where.get('measures') or name}: {kind}")
    task = made_by(name, complete, Path(folder), where.get("", ""))
    task.validate()
    try:
        task.variants  # noqa: B018
    except Refused as problem:
        raise refuse(problem.message, "corruptions", problem.hint) from None
    return task


def expanded(tasks: Sequence[Task]) -> list[Task]:
    """Tasks, each followed by itself under corruptions."""
    made: dict[str, Task] = {}
    for task in tasks:
        made |= {t.name: made.get(t.name, t) for t in (task, *task.variants)}
    return list(made.values())


def _kinds() -> dict[str, Any]:
    from surgery.lab.choice import Choice
    from surgery.lab.classify import Classification
    from surgery.lab.harness import Harness
    from surgery.lab.images import Images
    from surgery.lab.perplexity import Perplexity
    from surgery.lab.tagging import Tokens

    return {
        "classification": Classification, "tokens": Tokens, "perplexity": Perplexity, "choice": Choice, "images": Images,
        "lm-eval": Harness,
    }  # fmt: skip


def as_tasks(given: Any) -> list[Task]:
    """A path, a task, or several, as tasks. Raises Refused."""
    if isinstance(given, Task):
        return expanded([given])
    if isinstance(given, str | os.PathLike):
        return read_tasks(given)
    if isinstance(given, Sequence) and given and all(isinstance(t, Task) for t in given):
        return expanded(given)
    raise Refused("tasks: expected a tasks file, a task, or a list of tasks", hint="surgery.lab.make_task(name, {…})")
