"""One merge of one slice: its inputs, its parameters, and the steps it is lowered to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import Refused
from surgery.ops import registry
from surgery.recipe.mergekit.config import Merge, Scope
from surgery.recipe.mergekit.draft import Draft
from surgery.recipe.mergekit.methods import REQUIRED, Method
from surgery.recipe.mergekit.references import Reference
from surgery.recipe.mergekit.values import Entry, Filters, Frame, Resolver, entries


@dataclass(frozen=True)
class Input:
    """A model, or blocks of one, as a step of the draft. shift: by how much its own block numbers are above the slice's."""

    name: str
    model: Reference
    scope: Scope
    shift: int
    place: str


@dataclass
class Job:
    """scopes: those of the slice and above, highest precedence first. suffix: tells its steps from other slices'.

    fixed: values of switches that differ between tensors, for the part that is being lowered.
    """

    draft: Draft
    merge: Merge
    base: Input | None
    others: list[Input]
    scopes: list[Scope]
    frame: Frame
    filters: Filters
    suffix: str
    place: str
    seeds: dict[str, int]
    fixed: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # native parameter -> where it was read last

    @property
    def method(self) -> Method:
        return self.merge.method

    @property
    def compat(self) -> bool:
        return self.merge.compat

    @property
    def resolver(self) -> Resolver:
        return Resolver(self.frame, self.filters, self.draft.note)

    # -- parameters ------------------------------------------------------------------------------------------------------

    def settings(self, name: str, of: Input | None = None) -> list[Entry]:
        """Everything said about a parameter, for one input or for all. Raises Refused where a value is lacking."""
        parameter = self.method.parameters[name]
        scopes = self.scopes if of is None else [of.scope, *self.scopes]
        found = entries(self.merge.document, scopes, parameter)
        shift = self.frame.start if of is None else of.shift
        if parameter.default is REQUIRED:
            place = self.place if of is None else of.place
            whose = "" if of is None else f" for `{of.model}`"
            lacking = self.resolver.lacking(found, shift)
            if lacking is not None:
                what = f"for `{lacking}`: no filter covers it" if found else "and none is given"
                raise Refused(
                    f"{place}: {self.method.name} needs `{name}`{whose} {what}",
                    hint=f"parameters: {{{name}: NUMBER}}, under a model or once at the end of the recipe",
                )
        return found

    def value(self, name: str, op: str, native: str | None = None, of: Input | None = None) -> Any:
        """A parameter as the operator `op` takes it (under the name `native`): scalar, gradient or map."""
        found = self.settings(name, of)
        if found == [found[-1]] and found[0].value is None:
            return None
        shift = self.frame.start if of is None else of.shift
        param = registry[op].param(native or name)
        made = self.resolver.native(name, found, shift, param)
        self.places[native or name] = found[0].place or self.place
        if param is not None and param.fixed and isinstance(made, dict | list):
            raise Refused(f"{found[0].place}: `{name}` cannot vary over the model")
        return made

    def each(self, name: str, op: str, inputs: Iterable[Input], native: str | None = None) -> Any:
        """A parameter that every input has: a list of values, or one number if all are equal."""
        made = [self.value(name, op, native, of=i) for i in inputs]
        if all(isinstance(v, int | float) and v == made[0] for v in made):
            return made[0]
        return made

    def one(self, name: str, op: str, native: str | None = None) -> Any:
        """A shared parameter, where `op` has one for each of a single delta: gradients are wrapped."""
        made = self.value(name, op, native)
        return [made] if isinstance(made, list) else made

    def switch(self, name: str) -> bool:
        """A boolean parameter."""
        return bool(self.plain(name))

    def plain(self, name: str) -> Any:
        """A parameter that is the same for all tensors of this part."""
        if name in self.fixed:
            return self.fixed[name]
        values = list(self.resolver.plain(self.settings(name), self.frame.start).values())
        return values[0] if values else self.method.parameters[name].default

    # -- steps -----------------------------------------------------------------------------------------------------------

    def step(self, hint: str, op: str, of: str | list[str], **keys: Any) -> str:
        """A step whose messages point to where its parameters are written."""
        if op not in registry:
            raise Refused(f"{self.place}: {self.method.name} needs the operator `{op}`, which is not installed here")
        where = {"": self.place, "of": self.place} | {key: self.places.get(key, self.place) for key in keys}
        return self.draft.step(hint + self.suffix, op, of, where, **keys)

    def delta(self, of: Input) -> str:
        """What an input has on top of the base."""
        assert self.base is not None
        hint = of.name.removesuffix(self.suffix) if self.suffix else of.name
        return self.step(f"{hint}_delta", "diff", [of.name, self.base.name])

    def seed(self, of: Input) -> dict[str, int]:
        """A seed that no other random step on the same model has; 0, the default, is not written."""
        used = self.seeds.get(str(of.model), 0)
        self.seeds[str(of.model)] = used + 1
        return {"seed": used} if used else {}
