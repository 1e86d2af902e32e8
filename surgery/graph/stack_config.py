"""The config of stacked blocks: counts, lists and patterns of layers joined as the blocks are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from surgery.checkpoint import config as configs
from surgery.checkpoint.structure import Tower
from surgery.graph.edit import LayersNode
from surgery.graph.node import Node

Config = dict[str, Any]
Origin = tuple[Config, int, list[int]]  # a config, the depth it describes, and which of its layers are meant


def stacked_config(slices: Sequence[Node], towers: Sequence[Tower]) -> Config | None:
    """The first slice's config, with everything that speaks of layers made true for the stack.

    Where all slices were cut from models whose configs speak alike of their layers, it is that config with the layers that
    were chosen, so that lists of layer kinds, indices and "the first k layers" follow. Otherwise counts are added up and lists
    of one entry per layer joined. Raises Refused where a config does not state the depth.
    """
    first = slices[0].config
    if first is None:
        return None
    origins = [_origin(node, tower) for node, tower in zip(slices, towers, strict=True)]
    prefix = towers[0].prefix
    known = [o for o in origins if o is not None]
    if len(known) == len(origins) and _alike(known, prefix):
        config, depth, mine = known[0]
        chosen = [i for _, _, keep in known for i in keep]
        cut, whole = configs.with_layers(config, depth, mine, prefix), configs.with_layers(config, depth, chosen, prefix)
        return _overlaid(first, cut, whole)
    return _joined(slices, towers)


def _origin(node: Node, tower: Tower) -> Origin | None:
    """The config that the blocks of a slice were described by before they were cut, and which of its layers they are."""
    keep, depth = list(range(tower.depth)), tower.depth
    while node.inputs:
        if isinstance(node, LayersNode) and node.tower.prefix == tower.prefix:
            keep, depth = [node.keep[i] for i in keep], node.tower.depth
            node = node.inputs[0]
            continue
        if node.config != node.inputs[0].config:
            break
        node = node.inputs[0]
    return None if node.config is None else (node.config, depth, keep)


def _alike(origins: Sequence[Origin], prefix: str) -> bool:
    """Whether all origins have one depth and would be cut in the same way."""
    depth = origins[0][1]
    if any(d != depth for _, d, _ in origins):
        return False
    probes = ([i for _, _, keep in origins for i in keep], [0], list(range(depth))[::-1])
    for probe in probes:
        seen = [_changes(config, configs.with_layers(config, depth, probe, prefix)) for config, _, _ in origins]
        if any(s != seen[0] for s in seen):
            return False
    return True


def _items(config: Config) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    for path, part in configs.subconfigs(config):
        for key, value in part.items():
            if not isinstance(value, dict):
                yield path, key, value


def _changes(before: Config, after: Config) -> dict[Any, Any]:
    old = {(path, key): value for path, key, value in _items(before)}
    return {(p, k): v for p, k, v in _items(after) if (p, k) not in old or old[p, k] != v}


def _overlaid(config: Config, cut: Config, whole: Config) -> Config:
    """`config` with what differs between `cut` (the first slice's layers) and `whole` (all of them)."""
    made = copy.deepcopy(config)
    for (path, key), value in _changes(cut, whole).items():
        part = made
        for step in path:
            part = part[step]
        part[key] = value
    return made


def _joined(slices: Sequence[Node], towers: Sequence[Tower]) -> Config:
    """Counts added up, lists and patterns of one entry per layer joined."""
    parts = [node.config or {} for node in slices]
    depths = [tower.depth for tower in towers]
    total = sum(depths)
    repeated = [*range(depths[0]), *[depths[0] - 1] * (total - depths[0])]
    made = configs.with_layers(parts[0], depths[0], repeated, towers[0].prefix)
    for path, part in configs.subconfigs(made):
        for key, value in part.items():
            per_layer = isinstance(value, list) or (isinstance(value, str) and key.endswith("_pattern"))
            if not per_layer or len(value) != total:
                continue
            pieces = [_found(config, path, key) for config in parts]
            if all(type(p) is type(value) and len(p) == d for p, d in zip(pieces, depths, strict=True)):
                part[key] = "".join(pieces) if isinstance(value, str) else [v for p in pieces for v in p]
    return made


def _found(config: Any, path: tuple[str, ...], key: str) -> Any:
    for step in path:
        config = config.get(step) if isinstance(config, dict) else None
    return config.get(key) if isinstance(config, dict) else None
