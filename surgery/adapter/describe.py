"""What an adapter holds, for people and as plain data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from surgery.adapter.factors import expr_of, scale_of
from surgery.adapter.node import AdapterNode, BoundNode
from surgery.graph.node import Node


def describe(node: AdapterNode, base: Node | None) -> dict[str, Any]:
    """Plain data. base: also look its tensors up there. Raises Refused where it does not fit."""
    adapter = node.adapter
    config, found = adapter.config, adapter.contents
    targets = []
    for target in found.targets:
        a, b = expr_of(node.file, target.a or ""), expr_of(node.file, target.b or "")
        stacked = target.nest > 0 or target.module.endswith("experts")
        rank = a.shape[0]
        entry: dict[str, Any] = {"module": target.label, "rank": rank, "in": a.shape[-1], "out": b.shape[0]}
        if target.embedding:
            entry |= {"in": a.shape[1], "kind": "embedding"}
        if stacked:
            entry["kind"] = "stacked experts"  # rows of A are ranks times experts
        else:
            entry["scale"] = scale_of(node, adapter, node.file, target)
        if target.magnitude is not None:
            entry["dora"] = True
        targets.append(entry)
    made: dict[str, Any] = {
        "adapter": adapter.source.location,
        "base": config.base,
        "dtype": Counter(e.dtype.torch for e in node.file.tensors.values()).most_common(1)[0][0],
        "bytes": adapter.source.nbytes,
        "parameters": sum(s.numel for s in adapter.source.tensors.values()),
        "rslora": config.rslora,
        "dora": any(t.magnitude is not None for t in found.targets),
        "targets": targets,
        "full": sorted(found.full),
        "token_rows": {m: config.token_rows(m) for m in found.tokens},
        "ignored": dict(found.ignored),
    }
    if base is not None:
        bound = BoundNode(base, node, node.label)
        made["changes"] = sorted(bound.tensors)
    return made


def description(found: dict[str, Any]) -> str:
    """Lines for people: modules of one kind together."""
    from surgery.engine.render import amount

    groups: dict[tuple[Any, ...], int] = {}
    for t in found["targets"]:
        leaf = t["module"].removesuffix(".base_layer").rpartition(".")[2]
        key = (leaf, t["rank"], t.get("scale"), t["in"], t["out"], t.get("kind", ""), t.get("dora", False))
        groups[key] = groups.get(key, 0) + 1
    lines = [f"{found['adapter']}: {len(found['targets'])} modules, {found['parameters']:,} parameters, "
             f"{amount(found['bytes'])} {found['dtype']}"]  # fmt: skip
    lines.append(f"trained on: {found['base'] or 'not said'}")
    for (leaf, rank, scale, inner, outer, kind, dora), count in groups.items():
        extra = " ".join(filter(None, (kind, "DoRA" if dora else "", "" if scale is None else f"scale {scale:g}")))
        lines.append(f"  {leaf:16} x {count:<4} rank {rank:<4} {inner} -> {outer}  {extra}".rstrip())
    if found["full"]:
        more = f", … ({len(found['full'])})" if len(found["full"]) > 6 else ""
        lines.append(f"in full: {', '.join(found['full'][:6])}{more}")
    for module, rows in found["token_rows"].items():
        lines.append(f"trained rows of {module}: {len(rows or [])}")
    if "changes" in found:
        lines.append(f"fits: changes {len(found['changes'])} tensors of the base")
    return "\n".join(lines)
