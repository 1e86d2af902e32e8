"""Which tensors of a model an adapter's modules are.

Names agree as a rule. Where they do not, it is for one of few reasons: the checkpoint was saved without the class of the head
around it (`h.0` for `transformer.h.0`), its experts lie apart while the adapter's are stacked, or a module has a new name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from surgery.adapter.keys import Target
from surgery.errors import Refused, did_you_mean

Shapes = Mapping[str, tuple[int, ...]]
_ALIASES = (("mlp", "block_sparse_moe"), ("block_sparse_moe", "mlp"))  # modules that were renamed, on disk or in memory
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # gate, up and down of one expert
FUSED = ("gate_up_proj", "down_proj")  # the same stacked, in the order in which modules register them
# Models whose stacked experts are (experts, in, out): needed where shapes do not tell.
IN_OUT = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")


@dataclass(frozen=True)
class Experts:
    """Where a stacked target goes. parameter: which of the module's; stacked: the tensor that holds all experts, or None;
    apart: per expert the tensors that its rows are cut into, in order."""

    target: Target
    parameter: str
    count: int
    rank: int
    transposed: bool = False
    stacked: str | None = None
    apart: tuple[tuple[str, ...], ...] = ()


class Names:
    """Looks up adapter names among a model's tensors."""

    def __init__(self, shapes: Shapes, tied_to: Callable[[str], str | None]) -> None:
        self.shapes, self.tied_to = shapes, tied_to
        self._by_tail: dict[str, list[str]] = {}
        for name in shapes:
            parts = name.split(".")
            for i in range(1, len(parts)):
                self._by_tail.setdefault(".".join(parts[i:]), []).append(name)
        self._flat: dict[str, list[str]] = {}
        for name in shapes:
            self._flat.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)

    def find(self, name: str) -> str | None:
        """The model's name for the tensor that an adapter calls `name`, None if it has no such tensor."""
        for said in (name, *self._renamed(name)):
            if said in self.shapes or self.tied_to(said) is not None:
                return said
            parts = said.split(".")
            for i in range(len(parts) - 1):  # without leading parts, or below a prefix
                tail = ".".join(parts[i:])
                if i and tail in self.shapes:
                    return tail
                if found := self._by_tail.get(tail):
                    if len(found) > 1:
                        return None  # several places: better none than a wrong one
                    return found[0]
                if any(p.isdigit() for p in parts[: i + 1]):
                    break  # what is left no longer says which block
        return None

    def flat(self, module: str) -> str | None:
        """The tensor whose module's path has underscores for dots."""
        found = self._flat.get(module, [])
        return found[0] if len(found) == 1 else None

    def near(self, name: str) -> str | None:
        return did_you_mean(name, self.shapes)

    @staticmethod
    def _renamed(name: str) -> Iterable[str]:
        for old, new in _ALIASES:
            if f".{old}." in name:
                yield name.replace(f".{old}.", f".{new}.")


def parameter_of(said: str, module: str) -> str | None:
    """The last part of an entry of target_parameters (`experts.down_proj`), if the entry is about `module`."""
    home, _, leaf = said.rpartition(".")
    return leaf if not home or module == home or module.endswith(f".{home}") else None


def weight_of(names: Names, target: Target, parameters: Sequence[str] = ()) -> str | None:
    """The tensor that a target of two factors changes: the module's weight, or the parameter that the config names."""
    if target.flat:
        return names.flat(target.module)
    leaves = [leaf for p in parameters for leaf in [parameter_of(p, target.module)] if leaf not in (None, "weight")]
    for leaf in ("weight", *leaves):
        if found := names.find(f"{target.module}.{leaf}"):
            return found
    return None


def is_stacked(names: Names, target: Target, parameters: Sequence[str]) -> bool:
    """True if the module holds stacked experts rather than one matrix."""
    if target.nest > 0:
        return True
    name = weight_of(names, target, parameters)
    if name is None:
        return target.module.endswith("experts")
    return len(names.shapes.get(name, ())) == 3


def experts_of(
    names: Names,
    targets: Sequence[Target],
    factors: Callable[[Target], tuple[tuple[int, ...], tuple[int, ...]]],
    rank_of: Callable[[str], int],
    parameters: Sequence[str],
    model_type: str | None,
    label: str,
) -> list[Experts]:
    """Where the targets of one module of stacked experts go. factors: the shapes of A and B; parameters: what the config says
    was targeted. Raises Refused where the model has no such experts, or shapes differ."""
    module = targets[0].module
    inner_first = sorted(targets, key=lambda t: -t.nest)
    named = [leaf for p in parameters for leaf in [parameter_of(p, module)] if leaf is not None]
    wanted = [p for p in FUSED if p in named] or sorted(set(named)) or list(FUSED)
    if len(wanted) != len(inner_first):
        found = ", ".join(f"`{t.label}`" for t in inner_first)
        raise Refused(
            f"{label}: {found} could be {' or '.join(wanted)} of `{module}`",
            hint="adapter_config.json must name what was trained in target_parameters",
        )
    home = _experts_home(names, module)
    if home is None:
        raise Refused(f"{label}: the base has no `{module}` with experts", hint=names.near(f"{module}.0"))
    orders = [wanted] if set(wanted) <= set(FUSED) else [wanted, wanted[::-1]]
    problems: list[str] = []
    for order in orders:
        try:
            return [
                _placed(names, home, t, p, factors(t), rank_of(f"{module}.{p}"), model_type)
                for t, p in zip(inner_first, order, strict=True)
            ]
        except ValueError as problem:
            problems.append(str(problem))
    raise Refused(f"{label}: {problems[0]}", hint="was it trained on another base?")


def _experts_home(names: Names, module: str) -> str | None:
    """The path under which the model has that module's experts."""
    tails = [module, *Names._renamed(f".{module}.")]
    for said in (t.strip(".") for t in tails):
        parts = said.split(".")
        for i in range(len(parts)):
            tail = ".".join(parts[i:])
            homes = {
                n[: m.end() - 1]
                for n in names.shapes
                if (m := re.search(rf"(?:^|\.){re.escape(tail)}\.", n)) is not None
            }
            if len(homes) == 1:
                return homes.pop()
            if homes or any(p.isdigit() for p in parts[: i + 1]):
                break
    return None


def _placed(
    names: Names,
    home: str,
    target: Target,
    parameter: str,
    factors: tuple[tuple[int, ...], tuple[int, ...]],
    rank: int,
    model_type: str | None,
) -> Experts:
    """Raises ValueError with what does not fit."""
    (rows, inner), (outer, columns) = factors
    if rows != columns or rows % rank:
        raise ValueError(f"`{target.label}`: factors {[rows, inner]} and {[outer, columns]} are no stack of rank {rank}")
    count = rows // rank
    stacked = f"{home}.{parameter}"
    if stacked in names.shapes:
        have = names.shapes[stacked]
        fits = [have == (count, outer, inner), have == (count, inner, outer)]
        if not any(fits):
            raise ValueError(
                f"`{stacked}` is {list(have)} in the base, `{target.label}` has {count} experts of {[outer, inner]}"
            )
        transposed = fits[1] and (not fits[0] or model_type in IN_OUT)
        return Experts(target, parameter, count, rank, transposed, stacked=stacked)
    for gate, up, down in _PROJECTIONS:
        cut = (gate, up) if parameter == FUSED[0] else (down,)
        apart = tuple(tuple(f"{home}.{e}.{p}.weight" for p in cut) for e in range(count))
        if apart[0][0] not in names.shapes:
            continue
        for parts in apart:
            shapes = [names.shapes.get(p) for p in parts]
            lines = sum(s[0] for s in shapes if s)
            if any(s is None or len(s) != 2 or s[1] != inner for s in shapes) or lines != outer:
                raise ValueError(f"`{parts[0]}` is {shapes[0]} in the base; `{target.label}` has experts of {[outer, inner]}")
        beyond = f"{home}.{count}.{cut[0]}.weight"
        if beyond in names.shapes:
            raise ValueError(f"the base has more experts (`{beyond}`) than the {count} of `{target.label}`")
        return Experts(target, parameter, count, rank, apart=apart)
    raise ValueError(f"the base has no `{stacked}`, and no expert of known projections below `{home}`")
