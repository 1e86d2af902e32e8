"""The tokens that an output has beyond those of the tokenizer that it begins with, and the ids that they get."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgery.checkpoint.vocabulary import added_entry
from surgery.vocabulary.members import Member
from surgery.vocabulary.tokenizer import NewToken


def new_tokens(members: Sequence[Member], named: Iterable[str], *, union: bool) -> list[NewToken]:
    """What is added to the first member's tokens, with ids from the end of its own.

    In a union first the ordinary pieces of each other model in turn, then its added tokens, each in the order of their ids;
    tokens without a row in their model are left out. Then those of the tokens `named` by rules that no model has. The order
    depends on the order of the models alone.
    """
    first = members[0]
    known = set(first.ids)
    found: list[tuple[str, dict[str, object] | None]] = []
    if union:
        others = [(m, sorted(m.ids.items(), key=lambda item: (item[1], item[0]))) for m in members[1:] if m.file is not None]
        for wanted_added in (False, True):
            for member, listed in others:
                assert member.file is not None
                added = member.file.added
                for token, i in listed:
                    if token not in known and (token in added) == wanted_added and i < member.rows:
                        known.add(token)
                        found.append((token, added.get(token)))
    for token in named:
        if token not in known:
            known.add(token)
            found.append((token, added_entry(token)))
    return [NewToken(token, first.length + n, entry) for n, (token, entry) in enumerate(found)]
