"""Models put together when they are evaluated (`ensemble:` in a file of its own): read, checked, and brought alive.

Nothing is written and nothing is merged: every member is alive, and their predictions are combined at every position.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.lab.combine import COLLABORATIVE, CONTRIBUTION, KINDS, MODULES, Kind
from surgery.lab.resident import Resident
from surgery.lab.subject import Subject

KEY = "ensemble"


@dataclass(frozen=True)
class Fused:
    """kind: one of `combine.KINDS` or `combine.MODULES`. members: role -> models, as `evaluate` takes them. options: the kind's
    parameters."""

    kind: str
    members: Mapping[str, Sequence[Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = KEY

    @property
    def learns(self) -> bool:
        """True where a gate has to be fitted first."""
        return self.kind == COLLABORATIVE.name and self.options.get("gate", "learned") == "learned"


def fuse(kind: str, *, name: str = KEY, **said: Any) -> Fused:
    """Put models together in logit space: a model for `evaluate`.

    said: the kind's roles (`large`, `tuned`, `base`, `members`, …; models as `evaluate` takes them) and parameters. Raises
    Refused.
    """
    return _checked(kind, said, name, lambda m: m)


def is_fused(model: Any) -> bool:
    """True for the path of a file that puts models together."""
    if not isinstance(model, str | os.PathLike) or Path(model).suffix.lower() not in (".yaml", ".yml"):
        return False
    from surgery.recipe.document import Document

    if not Path(model).is_file():
        return False
    data = Document(Path(model)).data
    return isinstance(data, dict) and KEY in data


def read_fused(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Fused:
    """Read a file with `ensemble: {kind: …}`. Paths are relative to it. Raises Refused with file:line:col."""
    from surgery.recipe.document import Document

    document = Document(Path(path))
    document.override(overrides or {})
    said = document.data.get(KEY)
    other = [k for k in document.data if k != KEY]
    if other:
        raise Refused(f"{document.place(other[0])}: unknown key `{other[0]}` beside `{KEY}`")
    if not isinstance(said, dict) or not isinstance(said.get("kind"), str):
        raise Refused(f"{document.place(KEY)}: `{KEY}` is a map with a `kind`", hint=f"known: {', '.join([*KINDS, *MODULES])}")

    def beside(location: Any) -> Any:
        if not isinstance(location, str) or not location:
            raise Refused(f"a member must be a path or a hub id, got {location!r}")
        here = Path(path).parent / Path(location).expanduser()
        parts = [str(p) if (p := Path(path).parent / Path(x).expanduser()).exists() else x for x in location.split("+")]
        return str(here) if here.exists() else "+".join(parts)

    try:
        return _checked(said["kind"], {k: v for k, v in said.items() if k != "kind"}, Path(path).stem, beside)
    except Refused as problem:
        at = next((k for k in said if f"`{k}`" in problem.message), "kind")
        raise Refused(f"{document.place(KEY, at)}: {problem.message}", hint=problem.hint) from None


def _checked(kind: str, said: Mapping[str, Any], name: str, locate: Callable[[Any], Any]) -> Fused:
    made = _kind(kind)
    members: dict[str, list[Any]] = {}
    for role in made.roles:
        given = said.get(role)
        if given is None:
            raise Refused(f"`{kind}` needs `{role}`", hint=f"its members are {', '.join(made.roles)}")
        if isinstance(given, list | tuple) and role not in made.several:
            raise Refused(f"`{role}` is one model, got {len(given)}")
        listed = list(given) if isinstance(given, list | tuple) else [given]
        if role == "members" and len(listed) < 2:
            raise Refused(f"`{role}` names {len(listed)} model, expected two or more")
        members[role] = [locate(m) for m in listed]
    options: dict[str, Any] = {}
    numbers, words = made.numbers or {}, made.words or {}
    for key, value in said.items():
        if key in words:
            options[key] = words[key].check(key, value, locate)
        elif key in numbers:
            options[key] = numbers[key].check(key, value)
        elif key == "weights" and made.weighted:
            options[key] = _weights(value, len(members["members"]))
        elif key not in made.roles:
            known = [*made.roles, *numbers, *words, *(["weights"] if made.weighted else [])]
            raise Refused(f"`{kind}` has no key `{key}`", hint=did_you_mean(key, known) or f"its keys are {', '.join(known)}")
    return Fused(kind, members, options, name)


def _kind(name: str) -> Kind:
    if name in MODULES:
        return MODULES[name]
    if name not in KINDS:
        known = [*KINDS, *MODULES]
        raise Refused(
            f"there is no `kind` of ensemble {name!r}", hint=did_you_mean(name, known) or f"known: {', '.join(known)}"
        )
    return KINDS[name]


def _weights(value: Any, count: int) -> list[float]:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) != count or min(value) < 0 or sum(value) <= 0:
        raise Refused(f"`weights` must be {count} numbers, none negative and not all 0, got {value!r}")
    return [float(v) for v in value]


def alive(spec: Fused, name: str, resident: Resident, subject: Callable[..., Subject], tasks: Sequence[Any] = ()) -> Subject:
    """All members alive at once, as one subject. subject: `Evaluator.subject`. tasks: what a gate is learned on. Raises Refused
    where they do not go together."""
    found: dict[str, list[Subject]] = {role: [] for role in spec.members}
    for number, (role, i, model) in enumerate((r, i, m) for r, ms in spec.members.items() for i, m in enumerate(ms)):
        home = resident if number == 0 else resident.beside(f"{role}/{i}")
        found[role].append(subject(model, resident=home))
    everyone = [s for group in found.values() for s in group]
    first = everyone[0]
    _go_together(name, everyone)
    if spec.kind == COLLABORATIVE.name:
        return _gated(spec, name, found, tasks)
    if spec.kind == CONTRIBUTION.name:
        from surgery.lab.traced import Traced

        module: Any = Traced(found["tuned"][0], found["base"][0], **spec.options)
    else:
        from surgery.lab.fused_module import made_module

        module = made_module(KINDS[spec.kind], found, spec.options)
    return dataclasses.replace(first, module=module, name=name, forward=None, loaded=first.loaded)


def _gated(spec: Fused, name: str, found: Mapping[str, list[Subject]], tasks: Sequence[Any]) -> Subject:
    """One of two members speaks at every prediction; a gate that is to be learned is learned here."""
    from surgery.lab.gated import Gated, fitted

    numbers, words = COLLABORATIVE.numbers or {}, COLLABORATIVE.words or {}
    defaults = {k: n.default for k, n in numbers.items()} | {k: w.default for k, w in words.items()}
    options: dict[str, Any] = {**defaults, **spec.options}
    tuned, base = found["tuned"][0], found["base"][0]
    module = Gated(name, tuned, base, options)
    made = dataclasses.replace(tuned, module=module, name=name, forward=None, loaded=tuned.loaded)
    if module.gate == "learned":
        module.gate = fitted(made, tasks, options)
    return made


def fit_gate(
    spec: Fused | str | os.PathLike[str], tasks: Any, *, resident: Resident | None = None, name: str | None = None
) -> Any:
    """Learn the gate of a collaborative ensemble on the validation splits of tasks: a `gate.Gate`, to be saved or given to
    `fuse("collaborative", …, gate=…)`. Raises Refused."""
    from surgery.lab.evaluation import Evaluator

    spec = spec if isinstance(spec, Fused) else read_fused(spec)
    if not spec.learns:
        raise Refused(f"{name or spec.name}: has no gate to learn", hint="ensemble: {kind: collaborative, gate: learned, …}")
    return Evaluator(tasks, resident=resident).subject(spec, name).module.gate


def _go_together(name: str, members: Sequence[Subject]) -> None:
    """Refuse members of different kinds, classes, or tokens."""
    first = members[0]
    family = _family(first.kind)
    for other in members[1:]:
        if _family(other.kind) != family:
            raise Refused(
                f"{name}: {first.name} is a {first.kind}, {other.name} a {other.kind}: they give no common prediction"
            )
        if family and (first.files is not None or first.given_tokenizer is not None):
            mine, theirs = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
            if mine != theirs:
                word = next(iter(sorted(mine.items() ^ theirs.items())))[0]
                raise Refused(
                    f"{name}: the tokenizers of {first.name} and {other.name} differ, at {word!r} to begin with",
                    hint="logits can only be combined token by token where all members have the same tokens",
                )


def _family(kind: str) -> str:
    """The task that a transformers class is for, or "" for any other module."""
    names = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification", "Model")
    found = next((n for n in names if kind.endswith(n)), "")
    return "ForCausalLM" if found == "LMHeadModel" else found
