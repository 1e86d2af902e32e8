"""Aligning models to one vocabulary before they are merged.

`align` gives, for every model, one whose embeddings, heads and head biases have a row for each token of the output, in the
output's order; everything after that may combine them row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import promote
from surgery.errors import Refused, did_you_mean
from surgery.graph.expr import Expr
from surgery.graph.node import Node
from surgery.vocabulary.config import lost_ids
from surgery.vocabulary.gather import MEAN, PAD, ZERO, Array, Gathered, Mixed, is_stored
from surgery.vocabulary.members import Member, members_of
from surgery.vocabulary.node import AlignedNode
from surgery.vocabulary.policy import BASE, UNION, Policy
from surgery.vocabulary.rows import Defaults, Table, Target, ids_in, own_ids, rows_of
from surgery.vocabulary.template import find_template
from surgery.vocabulary.tokenizer import NewToken, OutputTokenizer
from surgery.vocabulary.union import new_tokens


@dataclass(frozen=True)
class Aligned:
    """What `align` made. nodes: name -> aligned model, or the model as it was where nothing had to change. tokenizer: what
    goes along with the output, for `Settings.vocabulary`; None where that is left to the config's donor."""

    nodes: dict[str, Node]
    tokenizer: OutputTokenizer | None

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments for `surgery.engine.settings.Settings`."""
        return {} if self.tokenizer is None else {"vocabulary": self.tokenizer}


def align(models: Mapping[str, Node], policy: Policy, *, keep: bool = False) -> Aligned:
    """Align models to the vocabulary that `policy` asks for. Reads headers and tokenizers, no tensors.

    models: name -> whole checkpoints or deltas, in the order of the recipe; the names are those that `policy` uses. A token
    that a model lacks gets the row of the only model that has it, else base's, else the mean of those that have it, else
    zeros (and a warning); in a delta always zeros. Models whose tokens are the output's already come back as they are, or,
    with keep, as nodes that know the output's tokenizer.

    Raises:
        Refused: unknown models, tokenizers that cannot be read, rules for tokens that the named model lacks.
    """
    if not models:
        raise policy.refuse("there is no model to take a vocabulary from")
    base = _base(models, policy)
    named = policy.source in models  # a model called base or union is that model
    union = policy.source == UNION and not named
    donor_name = policy.source if named else base if policy.source in (None, UNION, BASE) else policy.source
    assert donor_name is not None
    if donor_name not in models:
        raise policy.refuse(f"`{donor_name}` is not a model of this recipe", hint=did_you_mean(donor_name, models))
    template = find_template(policy, {name: models[name] for name in [base, *(n for n in models if n != base)]})
    if policy.source is None:
        tokenizer = None if template is None else OutputTokenizer(None, {}, template=template)
        return Aligned(dict(models), tokenizer)
    subjects = {name: node for name, node in models.items() if node.space in ("weights", "delta")}
    if donor_name not in subjects:
        raise policy.refuse(f"`{donor_name}` is no model: it has no tokenizer to take")
    members = members_of(subjects)
    warnings: list[str] = []
    if not any(m.file for m in members.values()) and not union and not policy.tokens:
        return _without_tokenizers(models, members, donor_name, template, policy)
    _assume(members, base, donor_name, policy, warnings)
    target, new = _target(members, donor_name, policy, union, warnings)
    tokenizer = OutputTokenizer(members[donor_name].source, dict(target.ids), new=new, template=template, warnings=warnings)
    tokenizer.check(policy, members[donor_name].file)
    if all(_fits(m, target) for m in members.values()) and not any(r.force for r in policy.tokens.values()):
        kept = {name: AlignedNode(node, [], tokenizer, "the same tokens") for name, node in subjects.items()} if keep else {}
        return Aligned({**models, **kept}, tokenizer)
    for member in members.values():
        if member.problem is not None:
            raise member.problem
    _check_statistics(models, target, policy)
    return Aligned({**models, **_aligned(members, base, target, policy, tokenizer, warnings)}, tokenizer)


def _check_statistics(models: Mapping[str, Node], target: Target, policy: Policy) -> None:
    """Statistics were collected from rows in their old places."""
    for name, node in models.items():
        if node.space in ("weights", "delta"):
            continue
        for tensor in target.donor.tables:
            if tensor in node.tensors:
                raise policy.refuse(
                    f"{name} holds statistics of `{tensor}`, whose rows the alignment moves",
                    hint="write the aligned models first, and collect their statistics",
                )


def _base(models: Mapping[str, Node], policy: Policy) -> str:
    if policy.base is not None:
        if policy.base not in models:
            raise policy.refuse(f"`{policy.base}` is not a model of this recipe", hint=did_you_mean(policy.base, models))
        return policy.base
    return next((name for name, node in models.items() if node.space == "weights"), next(iter(models)))


def _without_tokenizers(
    models: Mapping[str, Node], members: Mapping[str, Member], donor: str, template: str | None, policy: Policy
) -> Aligned:
    """No model has a tokenizer that can be read: rows can only be taken as they come."""
    if policy.pad_to_multiple_of:
        raise _unreadable(members[donor], policy)
    found = OutputTokenizer(members[donor].source, {}, template=template)
    found.warnings.append(f"no tokenizer of the inputs can be read: that of {donor} goes along, rows are taken as they are")
    return Aligned(dict(models), found)


def _unreadable(member: Member, policy: Policy) -> Refused:
    place = member.source.directory if member.source is not None and member.source.directory is not None else member.name
    return policy.refuse(
        f"{member.name}: no tokenizer can be read in {place}: which rows are which tokens is not known",
        hint="put its tokenizer.json there (AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one)",
    )


def _assume(members: Mapping[str, Member], base: str, donor: str, policy: Policy, warnings: list[str]) -> None:
    """A model without a readable tokenizer but with as many rows as base (or the donor) is taken to have its tokens."""
    for member in members.values():
        if member.file is not None or (not member.tables and member.name not in (base, donor)):
            continue
        alike = next((m for n in (base, donor) if (m := members[n]).file is not None and m.rows == member.rows), None)
        if alike is None or member.name == donor:
            raise _unreadable(member, policy)
        member.file, member.assumed = alike.file, alike.name
        warnings.append(f"{member.name} has no tokenizer that can be read: its {member.rows} rows are taken as {alike.name}'s")


def _target(
    members: Mapping[str, Member], donor_name: str, policy: Policy, union: bool, warnings: list[str]
) -> tuple[Target, list[NewToken]]:
    donor = members[donor_name]
    ordered = [donor, *(m for m in members.values() if m is not donor)]
    new = new_tokens(ordered, policy.tokens, union=union)
    ids = donor.ids if not new else {**donor.ids, **{t.token: t.id for t in new}}
    out = np.fromiter(ids.values(), np.int64, len(ids))
    theirs = {name: ids_in(m, ids) for name, m in members.items()}
    backed = [out[(t >= 0) & (t < members[name].rows)] for name, t in theirs.items() if not members[name].is_delta]
    reach = max([int(o.max()) for o in backed if len(o)] + [ids[token] for token in policy.tokens], default=-1)
    end = max(donor.rows, reach + 1) if policy.padding == "keep" else reach + 1
    pad = policy.pad_to_multiple_of or 1
    rows = -(-end // pad) * pad
    beyond = int(np.count_nonzero(out >= rows))
    if beyond and any(not _same_ids(m, ids) for m in members.values()):
        verb = "token of the tokenizer has" if beyond == 1 else "tokens of the tokenizer have"
        warnings.append(f"{beyond} {verb} no row in any model, and gets none")
    return Target(ids, donor, rows, end, theirs, out), new


def _same_ids(member: Member, ids: Mapping[str, int]) -> bool:
    return not member.tables or member.ids is ids or member.ids == ids


def _fits(member: Member, target: Target) -> bool:
    """Whether a model's rows are the output's already."""
    return not member.tables or (_same_ids(member, target.ids) and member.rows == target.rows)


def _aligned(
    members: Mapping[str, Member], base: str, target: Target, policy: Policy, tokenizer: OutputTokenizer, warnings: list[str]
) -> dict[str, Node]:
    own = {name: own_ids(m, target) for name, m in members.items()}
    axes = {tensor: axis for m in members.values() for tensor, axis in m.tables.items()}
    decided: dict[tuple[str, ...], Defaults] = {}
    made: dict[str, Node] = {}
    lacking = 0
    for name, member in members.items():
        if not member.tables:  # stays what it is: a delta of other tensors, an adapter without vocabulary rows
            made[name] = member.node
            continue
        tables: dict[str, Table] = {}
        named: dict[str, list[Member]] = {}
        for tensor, axis in axes.items():
            if not _has(member, tensor, axis):
                continue
            providers = named[tensor] = [m for m in members.values() if not m.is_delta and _has(m, tensor, axis)]
            key = tuple(m.name for m in providers)
            if key not in decided:
                chosen = [own[m.name] for m in providers]
                decided[key] = Defaults.decide(providers, chosen, members[base], target, policy, tensor)
                lacking = max(lacking, int(decided[key].lacking.sum()))
            tables[tensor] = rows_of(member, own[name], decided[key], target)
        others = dict.fromkeys(named[t][k].name for t, table in tables.items() for k in table.others)
        node = AlignedNode(member.node, [members[n].node for n in others], tokenizer)
        for tensor, table in tables.items():
            if tensor not in member.node.tensors:
                node.tied[tensor] = _expr(node, member, tensor, table, named[tensor], axes[tensor])
            elif not table.same or member.rows != target.rows:
                node.made[tensor] = _expr(node, member, tensor, table, named[tensor], axes[tensor])
        _describe(node, member, own[name], tables, named, target, policy, others)
        made[name] = node
    if lacking:
        verb = "token has a row in no model: zeros" if lacking == 1 else "tokens have rows in no model: zeros"
        warnings.append(f"{lacking} {verb}")
    _settle(made, members, base, own, target, tokenizer, warnings)
    return made


def _has(member: Member, tensor: str, axis: int) -> bool:
    """Whether a model has this table, if only by being tied to another, with rows of its vocabulary."""
    expr = member.table(tensor)
    return expr is not None and len(expr.shape) > axis and expr.shape[axis] == member.rows


def _expr(
    node: AlignedNode, member: Member, tensor: str, table: Table, providers: Sequence[Member], axis: int
) -> Expr:
    mine, rows = member.table(tensor), len(table.rows)
    assert mine is not None
    args = [mine]
    for k in table.others:
        expr = providers[k].table(tensor)
        assert expr is not None
        args.append(expr)
    shape = (*mine.shape[:axis], rows, *mine.shape[axis + 1 :])
    dtype = mine.dtype
    for k, other in zip(table.others, args[1:], strict=True):
        if (*other.shape[:axis], rows, *other.shape[axis + 1 :]) != shape:
            found = f"{list(mine.shape)} in {member.name}, {list(other.shape)} in {providers[k].name}"
            raise Refused(f"shapes differ for `{tensor}`: {found}", hint="all models must have the same hidden size")
        if other.dtype != dtype:
            dtype = _widest(tensor, member.name, dtype, providers[k].name, other.dtype)
    if table.rows.copies and all(a.dtype == dtype and is_stored(a) for a in args):
        return Gathered(args, table.rows, axis, shape, dtype, node)
    if not dtype.is_float or dtype.is_scaled_code:
        raise Refused(
            f"{member.name}: `{tensor}` is {dtype}: rows of it can be moved, but not averaged",
            hint="dequantise the checkpoint first, or name a model for each token: tokens: {TOKEN: {source: MODEL}}",
        )
    return Mixed(args, table.rows, axis, shape, dtype, node)


def _widest(tensor: str, name: str, dtype: Any, other_name: str, other: Any) -> Any:
    if not dtype.is_float or not other.is_float:
        raise Refused(f"`{tensor}` is {dtype} in {name} and {other} in {other_name}: rows cannot be exchanged")
    return promote(dtype, other)


def _settle(
    made: Mapping[str, Node],
    members: Mapping[str, Member],
    base: str,
    own: Mapping[str, Array],
    target: Target,
    tokenizer: OutputTokenizer,
    warnings: list[str],
) -> None:
    """Token ids in configs follow their tokens."""
    config = target.donor.node.config
    for name, node in made.items():
        if not isinstance(node, AlignedNode):
            continue
        member = members[name]
        node.rows = target.rows
        if _same_ids(member, target.ids):
            continue
        theirs = target.theirs[name]
        if np.array_equal(theirs[theirs >= 0], target.out[theirs >= 0]) and len(member.ids) == np.count_nonzero(theirs >= 0):
            continue
        move = _Move(member, target)
        node.move, node.own = move, config
        if member.source is not None:
            tokenizer.moves[id(member.source)] = move
        if name == base and (lost := lost_ids(node.inputs[0].config or {}, move)):
            warnings.append(f"the output has no token for {', '.join(lost)} of {name}: taken from {target.donor.name}")


class _Move:
    """From a member's token ids to the output's: None for a token that the output lacks; ids without a token stay."""

    def __init__(self, member: Member, target: Target) -> None:
        self._member, self._target = member, target

    @cached_property
    def _known(self) -> dict[int, int | None]:
        theirs, out = self._target.theirs[self._member.name], self._target.out
        known: dict[int, int | None] = dict.fromkeys(self._member.ids.values())
        has = theirs >= 0
        known.update(zip(theirs[has].tolist(), out[has].tolist(), strict=True))
        return known

    def __call__(self, i: int) -> int | None:
        return self._known.get(i, i)


def _describe(
    node: AlignedNode,
    member: Member,
    own: Array,
    tables: Mapping[str, Table],
    providers: Mapping[str, Sequence[Member]],
    target: Target,
    policy: Policy,
    others: Mapping[str, None],
) -> None:
    """One line for the plan: what moved, what only it has, where the rest comes from."""
    word = policy.source if policy.source == UNION else f"tokens of {target.donor.name}"
    tensor, table = next(iter(tables.items()))
    out = np.flatnonzero(own >= 0)
    facts = []
    if moved := int(np.count_nonzero(own[out] != out)):
        facts.append(f"{_count(moved, 'token')} moved")
    rest = [m.ids for m in providers[tensor] if m is not member]
    if not any(ids is member.ids for ids in rest):
        only = member.backed(set(member.ids).difference(*rest))
        facts += [f"{only:,} only in {member.name}"] if only else []
    if dropped := member.backed(set(member.ids).difference(target.ids)):
        facts.append(f"{dropped:,} not in the output")
    facts += _sources(table, providers[tensor], target)
    node.text = f"{word}, {target.rows} rows: " + (", ".join(facts) or "the same tokens")


def _sources(table: Table, providers: Sequence[Member], target: Target) -> list[str]:
    """Rows that are not the model's own: `5 rows from base`."""
    arg, facts = table.rows.arg, []
    for position, k in enumerate(table.others, start=1):
        if n := int(np.count_nonzero((arg == position) & target.tokens)):
            facts.append(f"{_count(n, 'row')} from {providers[k].name}")
    for kind, what in ((MEAN, "the mean of those that have it"), (ZERO, "zeros")):
        if n := int(np.count_nonzero((arg == kind) & target.tokens)):
            facts.append(f"{_count(n, 'row')} {what}")
    if n := int(np.count_nonzero(~target.tokens)):
        means = int(np.count_nonzero(arg == PAD))
        facts.append(f"{_count(n, 'row')} of padding" + (f" ({means} the mean of all tokens)" if means else ""))
    return facts


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("s" if n != 1 else "")

