"""`upcycle`, `downcycle`, `drop_layers` and `grow` as steps of recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint.source import open_source
from surgery.graph.edit import LayersNode
from surgery.graph.edit_forms import as_list, placed, tower_of
from surgery.graph.forms import STRINGS, form, near
from surgery.graph.node import Node, sources_of
from surgery.reshape.grow import GrowNode
from surgery.reshape.upcycle import DowncycleNode, UpcycleNode
from surgery.statistics.manifest import read_manifest
from surgery.statistics.node import StatisticsNode

_UPCYCLE: dict[str, Any] = {
    "experts": {"type": "integer", "minimum": 2, "description": "how many copies, where only the dense model is given"},
    "top": {"type": "integer", "minimum": 1, "description": "experts used per token (default 2)"},
    "gates": {"type": "string", "description": "random, zero, or a checkpoint of router weights (`surgery gates` makes one)"},
    "seed": {"type": "integer", "minimum": 0, "description": "of random routers"},
    "shared": {"type": "boolean", "description": "with an expert that is always on (XFT), or without; default as the family"},
}


@form("upcycle", takes="dense, experts…", keys=_UPCYCLE)
def upcycle(
    inputs: Sequence[Node],
    *,
    label: str | None,
    where: Mapping[str, str],
    experts: int | None = None,
    top: int = 2,
    gates: str = "random",
    seed: int = 0,
    shared: bool | None = None,
) -> Node:
    """A dense model as a mixture of experts (Mixtral, Qwen2-MoE or Qwen3-MoE layout, by the dense model's family).

    of: the dense model, whose attention, norms and embeddings are used; then the models whose feed-forward layers become the
    experts. With the dense model alone its layers are copied `experts` times. With equal experts the mixture computes exactly
    what the dense model does. Sources: sparse upcycling (arXiv 2212.05055); for the shared expert XFT (arXiv 2404.15247).
    """
    asker = Node(label, where)
    if len(inputs) == 2:
        raise asker.refuse("one expert is no mixture: give two or more after the dense model", key="of")
    if len(inputs) > 2 and experts not in (None, len(inputs) - 1):
        raise asker.refuse(f"`experts: {experts}` but {len(inputs) - 1} models are given", key="experts")
    count = len(inputs) - 1 if len(inputs) > 1 else experts
    if count is None:
        raise asker.refuse("upcycle needs `experts`, or models to take them from", key="of")
    if gates not in ("random", "zero"):
        gates = str(near(gates, where))
    return UpcycleNode(inputs, label, where, experts=count, top=top, gates=gates, seed=seed, shared=shared)


_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_SHARES = {"type": "array", "items": {"type": "number"}, "minItems": 1}
_DOWNCYCLE: dict[str, Any] = {
    "shared_weight": {
        "anyOf": [_SHARE, {"type": "object", "additionalProperties": _SHARE, "minProperties": 1}],
        "description": "share of the shared expert (XFT: 0.75), or a map of name glob to it",
    },
    "weights": {
        "anyOf": [_SHARES, {"type": "object", "additionalProperties": _SHARES, "minProperties": 1}, {"type": "string"}],
        "description": "shares of the routed experts, summing to 1; a map of name glob to such; or what `surgery mixing` made",
    },
}


@form("downcycle", takes="mixture", keys=_DOWNCYCLE)
def downcycle(
    inputs: Sequence[Node],
    *,
    label: str | None,
    where: Mapping[str, str],
    shared_weight: float | Mapping[str, float] = 0.75,
    weights: str | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
) -> Node:
    """A mixture of experts as a dense model again: experts mixed with given or learned weights, or equally.

    dense = shared_weight * shared + (1 - shared_weight) * sum_i weights_i expert_i. Source: XFT (arXiv 2404.15247), which
    learns the weights of every block (`surgery mixing`) and fixes shared_weight at 0.75. Mixing experts that were trained
    apart loses accuracy; evaluate it.
    """
    if isinstance(weights, str):
        weights = str(near(weights, where))
    return DowncycleNode(inputs[0], label, where, shared_weight=shared_weight, weights=weights)


_DROP: dict[str, Any] = {
    "count": {"type": "integer", "minimum": 1, "description": "how many neighbouring blocks"},
    "start": {"type": "integer", "minimum": 0, "description": "the first block to drop"},
    "distances": {"type": "string", "description": "of `surgery depth --json` or `statistics --kind angular`: the least go"},
    "tower": {"type": "string", "description": "which blocks, where a model has several towers"},
}


@form("drop_layers", takes="model", keys=_DROP, required=["count"])
def drop_layers(
    inputs: Sequence[Node],
    *,
    label: str | None,
    where: Mapping[str, str],
    count: int,
    start: int | None = None,
    distances: str | None = None,
    tower: str | None = None,
) -> Node:
    """Neighbouring blocks left out: given ones, the least useful by angular distance, or the deepest but the last.

    Source: Gromov et al. 2024, The unreasonable ineffectiveness of the deeper layers, arXiv 2403.17887: the run of blocks whose
    input and output differ least in angle goes. A few steps of fine-tuning afterwards repair most of the damage.
    """
    asker = Node(label, where)
    found = tower_of(inputs[0], tower, asker)
    if count >= found.depth:
        raise asker.refuse(f"`count: {count}` leaves nothing of {found.depth} blocks", key="count")
    if start is not None and distances is not None:
        raise asker.refuse("give `start` or `distances`, not both", key="start")
    if distances is not None:
        path = near(distances, where)
        row, depth = _collected(asker, path, inputs[0], count) if path.is_dir() else _listed(asker, path, count)
        start = _least(asker, path, row, depth, count, found.depth)
    first = found.depth - 1 - count if start is None else start
    if not 0 <= first <= found.depth - count:
        raise asker.refuse(f"blocks {first} to {first + count - 1} of {found.depth} do not exist", key="start")
    keep = [i for i in range(found.depth) if not first <= i < first + count]
    return placed(LayersNode(inputs[0], found, keep), label, where)


def _collected(asker: Node, path: Path, model: Node, count: int) -> tuple[list[float], int]:
    """From a statistics checkpoint, which must have been collected from this model."""
    import numpy as np

    manifest = read_manifest(path)
    if manifest is None or manifest.kind != "angular":
        hint = "surgery statistics MODEL --kind angular"
        raise asker.refuse(f"{path}: holds no angular distances", hint=hint, key="distances")
    node = StatisticsNode(open_source(str(path)), manifest)
    problem = node.mismatch(s.source for s in sources_of(model))
    if problem:
        raise asker.refuse(problem, hint="collect them again from that model", key="distances")
    stored = node.source.tensors.get(f"runs.{count}")
    if stored is None:
        raise asker.refuse(f"{path}: no angular distances for {count} blocks in it", key="distances")
    with open(stored.path, "rb") as file:
        file.seek(stored.offset)
        row = np.frombuffer(file.read(stored.nbytes), "<f8").tolist()
    return row, len(node.source.tensors) + 1


def _listed(asker: Node, path: Path, count: int) -> tuple[list[float], int]:
    """From the JSON of `surgery depth`."""
    try:
        table = json.loads(path.read_text("utf-8"))
        return list(table["distances"][str(count)]), int(table["depth"])
    except (OSError, ValueError, KeyError, TypeError):
        hint = f"make it: surgery depth MODEL --data FILE --most {count} --json > {path}"
        raise asker.refuse(f"{path}: no angular distances for {count} blocks in it", hint=hint, key="distances") from None


def _least(asker: Node, path: Path, row: list[float], stated: int, count: int, depth: int) -> int:
    if stated != depth or len(row) != depth - count + 1:
        raise asker.refuse(f"{path}: measured on a model of {stated} blocks, this one has {depth}", key="distances")
    return min(range(len(row)), key=lambda i: (row[i], i))


_GLOBS: Any = STRINGS
_GROW: dict[str, Any] = {
    "reads": _GLOBS | {"description": "matrices whose columns are the data (stacked)"},
    "tables": _GLOBS | {"description": "tables looked up by index (joined); token embeddings are found by themselves"},
    "writes": _GLOBS | {"description": "output layers (joined and halved); language model heads are found by themselves"},
}


@form("grow", takes="first, second", at_least=2, at_most=2, keys=_GROW)
def grow(
    inputs: Sequence[Node],
    *,
    label: str | None,
    where: Mapping[str, str],
    reads: Any = (),
    tables: Any = (),
    writes: Any = (),
) -> Node:
    """Two narrow models side by side as one twice as wide; its output is the mean of theirs.

    Matrices become [[A, 0], [0, B]]. Exact for networks without normalisation over the width; with layer or RMS norms the two
    halves share one scale, so the outputs agree only roughly until the wide model is trained on. Source: MixtureGrowth
    (Pham et al. 2024), initialisation "diag".
    """
    return GrowNode(
        inputs, label, where, reads=as_list(reads), tables=as_list(tables), writes=as_list(writes)
    )
