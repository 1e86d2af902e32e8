"""Which row of which model each row of an aligned table is: numpy over whole vocabularies, no loop over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import numpy as np

from surgery.vocabulary.gather import MEAN, PAD, ZERO, Array, Rows
from surgery.vocabulary.members import Member
from surgery.vocabulary.policy import Policy, TokenRule


@dataclass(frozen=True)
class Target:
    """The output's vocabulary. ids: token -> id. donor: whose tokenizer it is, or begins with. rows: of every aligned table.
    end: ids from here on are not of the donor's table but padding. theirs: name of a member -> its id of each token in the
    order of `ids`, -1 for those that it lacks; `out`: the output's, in the same order."""

    ids: Mapping[str, int]
    donor: Member
    rows: int
    end: int
    theirs: Mapping[str, Array]
    out: Array

    @cached_property
    def tokens(self) -> Array:
        """(rows,) bool: ids that stand for a token."""
        used = np.zeros(self.rows, bool)
        used[self.out[self.out < self.rows]] = True
        return used


def ids_in(member: Member, ids: Mapping[str, int]) -> Array:
    """(tokens,) the member's id of each token of `ids`, -1 where it lacks it."""
    if member.ids is ids:
        return np.fromiter(ids.values(), np.int64, len(ids))
    return np.fromiter(map(member.ids.get, ids, repeat(-1)), np.int64, len(ids))


def own_ids(member: Member, target: Target) -> Array:
    """(rows,) the member's own id of each output token, -1 where it has none or no row for it."""
    own = np.full(target.rows, -1, np.int64)
    theirs, out = target.theirs[member.name], target.out
    keep = (theirs >= 0) & (theirs < member.rows) & (out < target.rows)
    own[out[keep][::-1]] = theirs[keep][::-1]  # of two names for one id the first counts
    return own


@dataclass(frozen=True)
class Defaults:
    """For each output row, where it comes from in models that lack the token: an index into `providers`, ZERO or MEAN, and
    the row there. lacking: tokens that no provider has and no rule names. forced: rows that replace even the model's own."""

    providers: Sequence[Member]
    own: Sequence[Array]
    arg: Array
    row: Array
    forced: Array
    lacking: Array

    @staticmethod
    def decide(
        providers: Sequence[Member], own: Sequence[Array], base: Member, target: Target, policy: Policy, tensor: str
    ) -> Defaults:
        """providers: the models (no deltas) that have the table `tensor`, in order. Raises Refused for a rule without a row."""
        rows = target.rows
        table = np.stack(own) if own else np.full((0, rows), -1, np.int64)
        has = table >= 0
        count = has.sum(axis=0)
        arg = np.where(count == 0, ZERO, MEAN)
        row = np.zeros(rows, np.int64)
        order = [k for k, m in enumerate(providers) if m is base]
        for k in range(len(providers)):
            only = has[k] & (count == 1)
            arg[only], row[only] = k, table[k][only]
        for k in order:
            arg[has[k]], row[has[k]] = k, table[k][has[k]]
        forced = np.zeros(rows, bool)
        lacking = target.tokens & (count == 0)
        for token, rule in policy.tokens.items():
            at = target.ids[token]
            if at >= rows:
                continue
            forced[at] = rule.force
            if rule.zero:
                arg[at], lacking[at] = ZERO, False
            elif rule.model is not None:
                names = [m.name for m in providers]
                if rule.model not in names:
                    raise policy.refuse(f"token `{token}`: {rule.model} has no `{tensor}` to take a row from", key="tokens")
                arg[at] = names.index(rule.model)
                row[at], lacking[at] = _row(token, rule, providers[arg[at]], policy), False
        return Defaults(providers, own, arg, row, forced, lacking)


def _row(token: str, rule: TokenRule, member: Member, policy: Policy) -> int:
    wanted = rule.token if rule.token is not None else token
    found = rule.id if rule.id is not None else member.ids.get(wanted)
    if found is None:
        raise policy.refuse(
            f"token `{token}`: {member.name} has no token `{wanted}`",
            hint="say {model: …, token: …} with a token that it has, {model: …, id: …}, or zero",
            key="tokens",
        )
    if found >= member.rows:
        raise policy.refuse(
            f"token `{token}`: {member.name} has {member.rows} rows, none with id {found}",
            key="tokens",
        )
    return found


@dataclass(frozen=True)
class Table:
    """The rows of one member's table: `rows.arg` counts the member itself as 0, then `others` (indices of providers)."""

    rows: Rows
    others: tuple[int, ...]

    @property
    def same(self) -> bool:
        """True if every row is the member's own row at the same place."""
        return bool(np.all(self.rows.arg == 0) and np.all(self.rows.row == np.arange(len(self.rows))))


def rows_of(member: Member, own: Array, defaults: Defaults, target: Target) -> Table:
    """Own rows first, defaults where it lacks the token; padding stays in place. A delta lacks nothing: its rows are zero."""
    rows = target.rows
    tokens = target.tokens
    arg, row = np.full(rows, PAD, np.int64), np.zeros(rows, np.int64)
    mine = (own >= 0) & ~defaults.forced
    arg[mine], row[mine] = 0, own[mine]
    other = tokens & ~mine
    if member.is_delta:
        arg[other] = ZERO
    else:
        arg[other] = np.where(defaults.arg[other] >= 0, defaults.arg[other] + 1, defaults.arg[other])
        row[other] = np.where(defaults.arg[other] >= 0, defaults.row[other], 0)
    _padding(member, arg, row, tokens, target, defaults)
    mean_at = np.flatnonzero(arg == MEAN)
    means = np.full((len(mean_at), len(defaults.providers) + 1), -1, np.int64)
    for k, ids in enumerate(defaults.own):
        means[:, k + 1] = ids[mean_at]
    if member in defaults.providers:  # its own rows are argument 0, and it is no other
        k = defaults.providers.index(member) + 1
        arg[arg == k] = 0
        means[:, 0], means[:, k] = means[:, k], -1
    return _compact(Rows(arg, row, mean_at, means, tokens))


def _padding(member: Member, arg: Array, row: Array, tokens: Array, target: Target, defaults: Defaults) -> None:
    """Rows without a token, up to the end of the donor's table: the member's own at the same place if it has no token there
    either, else the donor's. From there on (PAD) the mean of the table, zero in a delta."""
    places = np.flatnonzero(~tokens[: target.end])
    unused = np.zeros(len(tokens), bool)
    reach = min(member.rows, len(tokens))
    unused[:reach] = ~member.has_id(reach)
    donor = next((k for k, m in enumerate(defaults.providers) if m is target.donor), None)
    own = places[unused[places]]
    arg[own], row[own] = 0, own
    if donor is not None and not member.is_delta:
        theirs = places[~unused[places] & (places < target.donor.rows)]
        arg[theirs], row[theirs] = donor + 1, theirs
    if member.is_delta:
        arg[arg == PAD] = ZERO


def _compact(rows: Rows) -> Table:
    """Only arguments that are used, the member itself always."""
    used = set(np.unique(rows.arg[rows.arg >= 0]).tolist())
    used |= set(np.flatnonzero((rows.means >= 0).any(axis=0)).tolist()) if len(rows.mean_at) else set()
    kept = [0, *sorted(used - {0})]
    renumber = np.full(rows.means.shape[1] + 1, -1, np.int64)
    renumber[kept] = np.arange(len(kept))
    arg = np.where(rows.arg >= 0, renumber[np.maximum(rows.arg, 0)], rows.arg)
    made = Rows(arg, np.where(arg >= 0, rows.row, 0), rows.mean_at, rows.means[:, kept], rows.tokens)
    return Table(made, tuple(k - 1 for k in kept[1:]))
