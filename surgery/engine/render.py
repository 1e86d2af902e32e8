"""A plan as text and as plain data. One tree; steps used twice are printed once and named after."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

from surgery.engine.plan import Plan
from surgery.engine.price import peak_memory
from surgery.engine.profile import Profile
from surgery.graph.node import Node, SourceNode


def amount(n: float) -> str:
    """Bytes for people: 16.1 GB, 340 MB, 12 kB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n < 99.95 * size else f"{n / size:.0f} {unit}"
    return f"{n:.0f} B"


def plan_text(plan: Plan, *, threads: int | None = None) -> str:
    """What `surgery plan` prints."""
    workers = threads or len(os.sched_getaffinity(0))
    peak = peak_memory(plan.price, len(plan.programs), workers)
    free = shutil.disk_usage(os.getcwd()).free
    shards = len(plan.layout.shards)
    kinds = Counter[str]()
    for p in plan.programs:
        kinds[p.dtype.torch] += p.nbytes
    types = " + ".join(k for k, _ in kinds.most_common(2)) + (" + …" if len(kinds) > 2 else "")
    lines = [
        f"WRITE {shards} file{'s' * (shards > 1)}, {len(plan.programs)} tensors, {amount(plan.layout.size)} {types}",
        f"COST  read {amount(plan.price.read)}   peak memory {amount(peak)} ({workers} threads)   free disk {amount(free)}",
    ]
    lines += [f"      of which {amount(n)} to measure {what}" for what, n in plan.price.passes]
    lines += ["PLAN", *(f"  {line}" for line in tree_text(plan).splitlines())]
    lines += list(_inputs(plan))
    lines += [f"WARN  {w}" for w in plan.warnings]
    return "\n".join(lines)


def tree_text(plan: Plan, profile: Profile | None = None) -> str:
    """The graph, output first, two spaces a level, with how many output tensors each step takes part in."""
    counts = _counts(plan)
    seen: set[int] = set()
    lines: list[str] = []

    def visit(node: Node, level: int) -> None:
        indent, name = "  " * level, f"{node.label}: " if node.label and not isinstance(node, SourceNode) else ""
        if id(node) in seen and not isinstance(node, SourceNode):
            lines.append(f"{indent}{name}(as above)")
            return
        seen.add(id(node))
        facts = [f"{counts[id(node)]} tensors"] if counts.get(id(node)) else []
        if profile is not None and id(node) in profile.nodes:
            facts.append(f"{profile.nodes[id(node)] * 1e3:.0f} ms")
        text = f"{indent}{name}{node.verb} {node.text}".rstrip()
        lines.append(f"{text:<64} {'   '.join(facts)}".rstrip())
        for inner in node.inputs:
            visit(inner, level + 1)

    visit(plan.node, 0)
    passed = sum(p.copies for p in plan.programs)
    if passed:
        lines.append(f"{passed} tensors are copied unchanged")
    return "\n".join(lines)


def profile_text(plan: Plan, profile: Profile, seconds: float, peak: int) -> str:
    """The same tree with what was measured."""
    lines = [tree_text(plan, profile)]
    for step, (spent, size) in sorted(profile.steps.items()):
        rate = size / max(spent, 1e-9) / 1e9
        lines.append(f"{step:<8} {spent * 1e3:8.0f} ms of worker time   {amount(size)}   {rate:.1f} GB/s")
    moved = sum(size for _, size in profile.steps.values())
    lines.append(f"{'total':<8} {seconds * 1e3:8.0f} ms   {moved / seconds / 1e9:.1f} GB/s   peak memory {amount(peak)}")
    return "\n".join(lines)


def _counts(plan: Plan) -> dict[int, int]:
    """For each node: how many output tensors have an expression that it made, or whose expression passes through it."""
    counts: dict[int, int] = {}
    from surgery.graph.node import ancestry

    for node in ancestry(plan.node):
        if not isinstance(node, SourceNode):
            counts[id(node)] = len(node.tensors)
    return counts


def _inputs(plan: Plan) -> Iterator[str]:
    for use in plan.uses:
        parts = f"{use.computed} computed with, {use.passed} copied, {len(use.refused)} left out"
        yield f"INPUT {use.source.label}: {use.total} tensors: {parts}   {use.source.location}"
        reasons: dict[str, list[str]] = {}
        for name, reason in use.refused.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")
            yield f"      left out: {shown}: {reason}"


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    workers = len(os.sched_getaffinity(0))
    ids: dict[int, int] = {}

    def tree(node: Node) -> dict[str, Any]:
        if id(node) in ids:
            return {"ref": ids[id(node)]}
        ids[id(node)] = len(ids)
        made: dict[str, Any] = {"id": ids[id(node)], "op": node.verb.lower(), "space": node.space, "label": node.label}
        made["text"] = node.text
        if isinstance(node, SourceNode):
            made |= {"source": node.source.location, "fingerprint": node.source.fingerprint}
        made["tensors"] = len(node.tensors)
        made["inputs"] = [tree(n) for n in node.inputs]
        return made

    return {
        "tree": tree(plan.node),
        "output": {
            "files": [{"name": s.file, "size": s.size} for s in plan.layout.shards],
            "bytes": plan.layout.size,
            "tensors": [
                {"name": p.name, "dtype": p.dtype.torch, "shape": list(p.shape), "copied": p.copies} for p in plan.programs
            ],
        },
        "cost": {
            "read": plan.price.read,
            "written": plan.price.written,
            "passes": [{"for": what, "read": n} for what, n in plan.price.passes],
            "peak_memory": peak_memory(plan.price, len(plan.programs), workers),
            "peak_memory_of_one": peak_memory(plan.price, len(plan.programs), 1),  # below that --memory refuses
            "torch": plan.price.torch,
            "threads": workers,
        },
        "inputs": [
            {
                "name": u.source.label,
                "source": u.source.location,
                "tensors": u.total,
                "computed": u.computed,
                "copied": u.passed,
                "left_out": u.refused,
            }
            for u in plan.uses
        ],
        "warnings": plan.warnings,
        "token": plan.token,
    }
