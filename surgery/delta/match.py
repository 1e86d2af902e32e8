"""Which base tensor a tensor of the target is coded against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from surgery.delta.manifest import Tensor, comparable


def match(target: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, str]:
    """Target name -> base name; tensors without a counterpart are left out.

    The same name, where type and shape can be compared. Else the base tensor, not used otherwise, whose name has the longest
    common ending of at least two components: a model that was wrapped or unwrapped has other prefixes.
    """
    found = {name: name for name, t in target.items() if name in base and comparable(base[name], t)}
    by_ending: dict[tuple[str, ...], list[str]] = {}
    for name in base:
        if name not in found:
            by_ending.setdefault(_ending(name), []).append(name)
    taken: set[str] = set()
    for name, t in target.items():
        if name in found:
            continue
        near = [b for b in by_ending.get(_ending(name), ()) if b not in taken and comparable(base[b], t)]
        scores = sorted(((_common(name, b), b) for b in near), reverse=True)
        if scores and scores[0][0] >= 2 and (len(scores) == 1 or scores[0][0] > scores[1][0]):
            found[name] = scores[0][1]
            taken.add(scores[0][1])
    return found


def loose_ends(
    target: Mapping[str, Tensor], base: Mapping[str, Tensor], found: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """(target names without counterpart, unused base names of the same type and shape): worth comparing by content."""
    used = set(found.values())
    spare = {n: (t.dtype, t.shape) for n, t in base.items() if n not in used}
    kinds = set(spare.values())
    alone = [n for n, t in target.items() if n not in found and (t.dtype, t.shape) in kinds]
    wanted = {(target[n].dtype, target[n].shape) for n in alone}
    return alone, [n for n, kind in spare.items() if kind in wanted]


def _ending(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-2:])


def _common(a: str, b: str) -> int:
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count


def dropped(base: Iterable[str], used: Iterable[str]) -> list[str]:
    """Base tensors that the target has no use for, in order."""
    kept = set(used)
    return [name for name in base if name not in kept]
