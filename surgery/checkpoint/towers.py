"""Find the stacks of layers in a checkpoint from tensor names and shapes alone.

A *tower* is a stack of blocks: the longest-known pattern `prefix.0.…`, `prefix.1.…`. It is recognised by what
a stack is, not by what it is called: numbers that run from 0 without a hole, over children that look alike
and are more than a bare weight and bias.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

Shape = tuple[int, ...]
Elements = dict[int, dict[str, Shape]]  # number -> what follows it in the names -> shape

# A whole path component that is a number. Six digits are plenty, and keep hostile names cheap.
_NUMBER = re.compile(r"(?:(?<=\.)|^)(0|[1-9]\d{0,5})(?=\.|$)")
_NESTING = 6  # numbered lists inside each other that are looked through before giving up


@dataclass(frozen=True)
class Tower:
    """A stack of blocks applied one after another.

    `blocks` are the paths of the blocks in running order: `model.layers.0`, `model.layers.1`, …. Where blocks
    are grouped in stages (Swin, ResNet, ConvNeXt) they run through the stages: `encoder.layers.0.blocks.0`,
    `encoder.layers.0.blocks.1`, `encoder.layers.1.blocks.0`, …, and `prefix` is the path of the list of
    stages (for stages spelt `layer1.0`, `layer2.0`, … it is `layer`).
    """

    prefix: str
    blocks: tuple[str, ...]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def staged(self) -> bool:
        """Whether the blocks are grouped in stages: their widths differ, so they cannot be exchanged."""
        return self.blocks[0] != _join(self.prefix, "0")

    @cached_property
    def _index(self) -> dict[str, int]:
        return {path: i for i, path in enumerate(self.blocks)}

    def locate(self, name: str) -> tuple[int, str] | None:
        """Split a tensor name into its 0-based block index and what follows; None outside its blocks."""
        if name.startswith(self.prefix):
            for number in _NUMBER.finditer(name, len(self.prefix)):
                index = self._index.get(name[: number.end()])
                if index is not None:
                    return index, name[number.end() + 1 :]
        return None


def find_towers(shapes: Mapping[str, Shape]) -> tuple[Tower, ...]:
    """The towers of a checkpoint, in the order in which they appear.

    Args:
        shapes: tensor names in file order, with their shapes.

    A numbered list is a tower when its numbers are 0..n-1, its children are alike (each shares a tensor with
    another, so dense and mixture layers, or Mamba and attention layers, may alternate) and a child has at
    least two modules and two matrices. Lists inside a block (experts, sub-layers) are not towers, unless they
    hold most of it and their shapes change from one outer number to the next: those are stages. Lists of bare
    weights count only when there is no other tower.
    """
    towers, bare = _search(shapes, "", _NESTING)
    return tuple(_joined_stages(towers or bare))


def number_at(name: str, start: int) -> int:
    """Where the number that is the path component beginning at `start` ends; `start` itself if it is none."""
    found = _NUMBER.match(name, start)
    return found.end() if found else start


def _search(shapes: Mapping[str, Shape], prefix: str, nesting: int) -> tuple[list[Tower], list[Tower]]:
    """Towers, and lists of bare weights, under `prefix` (`shapes` are named relative to it)."""
    towers: list[Tower] = []
    bare: list[Tower] = []
    for before, elements in _numbered(shapes).items():
        path = _join(prefix, before)
        # `0.auto_model.…`: a wrapper numbered by hand, as sentence-transformers writes it, is no block.
        wrapper = len(elements) == 1 and not path
        if not wrapper and _alike(elements):
            if _contiguous(elements):
                if _are_blocks(elements):
                    towers.append(_staged(path, elements) or _plain(path, elements))
                elif len(elements) > 1:
                    bare.append(_plain(path, elements))
        elif nesting:
            for number, inside in elements.items():
                deeper, deeper_bare = _search(inside, _join(path, str(number)), nesting - 1)
                towers += deeper
                bare += deeper_bare
    return towers, bare


def _numbered(shapes: Mapping[str, Shape]) -> dict[str, Elements]:
    """Group names by what precedes their first number, then by that number."""
    groups: dict[str, Elements] = {}
    for name, shape in shapes.items():
        found = _NUMBER.search(name)
        if found:
            elements = groups.setdefault(name[: max(found.start() - 1, 0)], {})
            elements.setdefault(int(found[1]), {})[name[found.end() + 1 :]] = shape
    return groups


def _contiguous(elements: Elements) -> bool:
    return max(elements) == len(elements) - 1


def _alike(elements: Elements) -> bool:
    if len(elements) == 1:
        return True
    kinds = Counter(frozenset(inside) for inside in elements.values())
    owners = Counter(rest for kind in kinds for rest in kind)
    return all(count > 1 or any(owners[rest] > 1 for rest in kind) for kind, count in kinds.items())


def _are_blocks(elements: Elements) -> bool:
    return 2 * sum(_is_block(inside) for inside in elements.values()) >= len(elements)


def _is_block(inside: Mapping[str, Shape]) -> bool:
    """Two modules (inner numbers not counted apart) and two matrices: more than a linear and a norm."""
    modules: set[str] = set()
    matrices = 0
    for rest, shape in inside.items():
        modules.add(_NUMBER.sub("#", rest.rpartition(".")[0]))
        matrices += len(shape) >= 2
        if len(modules) > 1 and matrices > 1:
            return True
    return False


def _plain(path: str, elements: Elements) -> Tower:
    return Tower(path, tuple(_join(path, str(i)) for i in range(len(elements))))


def _staged(path: str, elements: Elements) -> Tower | None:
    """The tower through stages, if `elements` are stages and not blocks."""
    if len(elements) < 2:
        return None
    stages = [_numbered(elements[i]) for i in range(len(elements))]
    total = sum(map(len, elements.values()))
    for inner in stages[0]:
        lists = [stage[inner] for stage in stages if inner in stage]
        held = sum(len(inside) for blocks in lists for inside in blocks.values())
        if len(lists) < len(stages) or 2 * held < total:
            continue
        # Experts have the same shapes in every layer; a stage is a change of width.
        changes = sum(_shapes_differ(a[max(a)], b[max(b)]) for a, b in pairwise(lists))
        if 2 * changes < len(lists) - 1:
            continue
        if all(_contiguous(blocks) and _alike(blocks) and _are_blocks(blocks) for blocks in lists):
            return Tower(
                path,
                tuple(
                    _join(path, str(s), inner, str(b))
                    for s, blocks in enumerate(lists)
                    for b in range(len(blocks))
                ),
            )
    return None


def _shapes_differ(a: Mapping[str, Shape], b: Mapping[str, Shape]) -> bool:
    common = a.keys() & b.keys()
    return bool(common) and 2 * sum(a[rest] != b[rest] for rest in common) >= len(common)


def _joined_stages(towers: list[Tower]) -> list[Tower]:
    """Join `layer1`, `layer2`, … (torchvision and timm ResNets), found as towers of their own, into one."""
    families: dict[str, list[tuple[int, Tower]]] = {}
    for tower in towers:
        stem = re.fullmatch(r"(.*[A-Za-z_])(\d{1,3})", tower.prefix)
        family, number = (stem[1], int(stem[2])) if stem else (tower.prefix, 0)
        families.setdefault(family, []).append((number, tower))
    joined = []
    for stem_name, members in families.items():
        members.sort(key=lambda member: member[0])
        numbers = [number for number, _ in members]
        if len(members) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            joined.append(Tower(stem_name, tuple(path for _, tower in members for path in tower.blocks)))
        else:
            joined += [tower for _, tower in members]
    return joined


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
