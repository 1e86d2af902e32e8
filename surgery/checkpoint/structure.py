"""How deep in a model each tensor sits, and how names change when its layers do: no table of architectures.

Block numbers come from the towers found in names and shapes. The words in names decide one thing only:
whether a tensor outside every block comes before or after the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from surgery.checkpoint.towers import Shape, Tower, find_towers, number_at
from surgery.errors import Refused

__all__ = ["Shape", "Structure", "Tower", "layers_renamed", "structure_of"]

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

# Words of tensors outside the blocks. Whatever matches neither comes after: norms, heads and projections are
# the usual remainder, and a stem always says what it embeds.
_AFTER = {"head", "heads", "out", "output", "final", "post", "last", "pooler", "score", "projector"}
_AFTER_ROOTS = ("classif", "logit", "predict", "postnet")
_BEFORE = {"wte", "wpe", "pos", "tok", "pre", "stem", "shared", "input", "in", "emb"}
_BEFORE_ROOTS = ("embed", "patch", "position", "token", "prenet", "conv", "feature")


@dataclass(frozen=True)
class Structure:
    """The towers of one checkpoint, in the order in which they appear in the file."""

    towers: tuple[Tower, ...]

    def block(self, name: str) -> tuple[Tower, int] | None:
        """The tower and 0-based block index that a tensor belongs to; None outside blocks."""
        for tower in self.towers:
            found = tower.locate(name)
            if found is not None:
                return tower, found[0]
        return None

    def position(self, name: str) -> float:
        """How deep in the model a tensor sits, in [0, 1].

        Block i of a tower of depth L is at i / (L - 1), or at 0 when L is 1. Outside the blocks it is 0 for
        what feeds them (embeddings, stems, positions) and 1 for what comes after (final norm, heads); what
        lies between the blocks of a staged tower (downsampling) takes the place of its stage's last block.
        """
        found = self.block(name)
        if found is None:
            found = self._stage_end(name)
        if found is not None:
            tower, index = found
            return index / (tower.depth - 1) if tower.depth > 1 else 0.0
        return 0.0 if _feeds_blocks(self._own_part(name)) else 1.0

    def _own_part(self, name: str) -> str:
        """What a name does not share with a tower's path: `convnext.layernorm` is no convolution."""
        parts = name.split(".")
        shared = 0
        for tower in self.towers:
            pairs = zip(parts, tower.prefix.split("."), strict=False)
            shared = max(shared, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return ".".join(parts[shared:])

    def _stage_end(self, name: str) -> tuple[Tower, int] | None:
        for tower in self.towers:
            if tower.staged and name.startswith(f"{tower.prefix}."):
                end = number_at(name, len(tower.prefix) + 1)
                inside = [i for i, path in enumerate(tower.blocks) if path.startswith(f"{name[:end]}.")]
                if inside:
                    return tower, inside[-1]
        return None


def structure_of(shapes: Mapping[str, Shape]) -> Structure:
    """Find the towers of a checkpoint from its tensor names, in file order, and their shapes."""
    return Structure(find_towers(shapes))


def layers_renamed(names: Iterable[str], tower: Tower, keep: Sequence[int]) -> dict[str, str]:
    """The renaming that keeps blocks `keep` of a tower in this order: `{new name: old name}`.

    The new numbers start at 0; blocks may be repeated. Names outside the tower stay. Tensors that only the
    first block has, on top of all that the second one has (T5's relative position table, RWKV's first norm),
    belong to the place and not to the block: they stay with block 0, whichever block that becomes.

    Raises:
        Refused: `keep` is empty or names a block that is not there, or the tower is staged.
    """
    wrong = sorted({i for i in keep if not 0 <= i < tower.depth})
    if wrong or not keep:
        what = f"no block {wrong[0]}" if wrong else "no block to keep"
        raise Refused(f"{what} in `{tower.prefix}`: it has {tower.depth} blocks", hint="count blocks from 0")
    if tower.staged:
        raise Refused(
            f"the blocks of `{tower.prefix}` are grouped in stages of different width",
            hint="keep them all; only towers of equal blocks can be cut or reordered",
        )
    places: dict[int, list[int]] = {}
    for new, old in enumerate(keep):
        places.setdefault(old, []).append(new)
    split = {name: tower.locate(name) for name in names}
    first = _first_block_only(found for found in split.values() if found)
    renamed: dict[str, str] = {}
    for name, found in split.items():
        if found is None:
            renamed[name] = name
            continue
        index, rest = found
        for new in [0] if index == 0 and rest in first else places.get(index, []):
            renamed[tower.blocks[0][:-1] + str(new) + (f".{rest}" if rest else "")] = name
    return renamed


def _first_block_only(located: Iterable[tuple[int, str]]) -> set[str]:
    inside: dict[int, set[str]] = {}
    for index, rest in located:
        inside.setdefault(index, set()).add(rest)
    zero, one = inside.pop(0, set()), inside.get(1)
    if one is None or not zero > one:
        return set()
    return zero.difference(*inside.values())


def _feeds_blocks(name: str) -> bool:
    if "bn1" in name.split("."):  # the norm of `conv1`, the one stem that does not say so
        return True
    words = [word.lower() for word in _WORD.findall(name)]
    if any(word in _AFTER or word.startswith(_AFTER_ROOTS) for word in words):
        return False
    return any(word in _BEFORE or word.startswith(_BEFORE_ROOTS) for word in words)
