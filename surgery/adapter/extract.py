"""A fine-tuned model as an adapter on its base: which tensors become factors, which are kept in full, which are left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.adapter.items import Item, Row
from surgery.adapter.match import FUSED, IN_OUT
from surgery.adapter.resolve import CONV1D
from surgery.adapter.values import Values
from surgery.checkpoint.dtypes import F32, F64
from surgery.checkpoint.structure import Structure
from surgery.checkpoint.ties import is_token_embedding
from surgery.errors import Refused, did_you_mean
from surgery.graph.expr import Expr, weighted
from surgery.graph.node import Node
from surgery.graph.values import matches

OTHERS = ("save", "skip", "refuse")
_NO_LINEAR = re.compile(r"(^|\.)relative_attention_bias\.weight$|embed")
_HEADED = re.compile(r"For[A-Z]|LMHead")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_BARE = ("h", "layers", "block", "blocks", "encoder", "decoder")


@dataclass
class Extraction:
    """What is to be written. others: tensors beside the factors, name -> (new value, change; None where the base has none)."""

    items: list[Item] = field(default_factory=list)
    others: dict[str, tuple[Expr, Expr | None]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def exprs(self) -> list[Expr]:
        found = [i.delta for i in self.items]
        for new, change in self.others.values():
            found += [new] if change is None else [new, change]
        return found


def extraction(
    model: Node,
    base: Node,
    *,
    only: Sequence[str] = (),
    save: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Extraction:
    """Sort the tensors of `model` by how its difference to `base` is to be stored. Reads nothing.

    only: globs of what becomes factors, default the linear layers of blocks. save: globs of what is kept in full if it changed.
    skip: globs of what is left out. Raises Refused where the two are not the same architecture, or a glob matches nothing.
    """
    made = Extraction()
    names = {**dict.fromkeys(model.tensors), **dict.fromkeys(base.tensors)}
    for option, globs in (("--only", only), ("--save", save), ("--skip", skip)):
        for glob in globs:
            if not any(matches(glob, n) for n in names):
                raise Refused(f"{option} {glob}: no tensor matches", hint=did_you_mean(glob, names))
    structure, config = base.structure, base.config or {}
    prefix = _module_prefix(base)
    for name in names:
        new = _of(model, name)
        if new is None:
            raise Refused(f"`{name}` is in {base.label} but not in {model.label}", hint="are these the model and its base?")
        if any(matches(g, name) for g in skip):
            made.rows.append(Row(name, new.shape, "left out"))
            continue
        old = _of(base, name)
        change = _change(name, new, old, model, base)
        factored = change is not None and not any(matches(g, name) for g in save) and _factored(name, new, structure, only)
        if not factored or change is None:
            made.others[name] = new, change
            continue
        module, _, leaf = name.rpartition(".")
        kind = config.get("model_type")
        turned = kind in (IN_OUT if len(new.shape) == 3 else CONV1D) and structure.block(name) is not None
        made.items.append(Item(name, change, prefix(module), leaf, is_token_embedding(name), turned))
    return made


def check_rank(rank: int | None, items: Sequence[Item]) -> None:
    """Refuse a rank that was asked for and that no matrix has."""
    limits = {i.name: min(i.delta.shape[-2:]) for i in items}
    if rank is None or not limits or rank <= max(limits.values()):
        return
    name = max(limits, key=lambda n: limits[n])
    raise Refused(f"--rank {rank}: above every matrix; the largest rank is {limits[name]}, of `{name}`")


def settle(found: Extraction, values: Values, policy: str, model: Node, save: Sequence[str] = ()) -> dict[str, Expr]:
    """Look which of the other tensors changed at all, and decide about them: those to be kept in full.

    policy: "save" them, "skip" them (they are reported), or "refuse". save: globs of what is kept whatever the policy.
    """
    changed: dict[str, Expr] = {}
    for name, (new, change) in found.others.items():
        if change is not None and not values.changed(change):
            found.rows.append(Row(name, new.shape, "unchanged"))
        elif policy == "save" or any(matches(g, name) for g in save):
            changed[name] = new
        elif policy == "skip":
            found.rows.append(Row(name, new.shape, "left out", error=1.0))
        else:
            raise Refused(
                f"`{name}` changed too, and is not among what becomes low-rank",
                hint=f"--save '{name}' keeps it in full, --skip '{name}' or --others skip leaves it out",
            )
    for name in list(changed):  # a module is kept whole
        module, _, leaf = name.rpartition(".")
        beside = f"{module}.bias"
        bias = model.tensors.get(beside)
        if leaf == "weight" and beside not in changed and bias is not None:
            changed[beside] = bias
            found.rows = [r for r in found.rows if r.name != beside]
    return changed


def targets(base: Node, items: Sequence[Item]) -> Callable[[Sequence[str]], Sequence[str]]:
    """Short names of modules where they mean exactly the modules written; whole paths otherwise."""
    modules = [n.removesuffix(".weight") for n, e in base.tensors.items() if n.endswith(".weight") and len(e.shape) == 2]
    mine = {i.name.removesuffix(".weight") for i in items}

    def short(written: Sequence[str]) -> Sequence[str]:
        leaves = sorted({m.rpartition(".")[2] for m in written})
        reached = {m for m in modules if m.rpartition(".")[2] in leaves}
        return leaves if reached == mine and len(written) == len(mine) else list(written)

    return short


def task_of(config: dict[str, Any] | None) -> str | None:
    """PEFT's word for what a model does."""
    names = (config or {}).get("architectures") or [""]
    return next((task for ending, task in _TASKS.items() if str(names[0]).endswith(ending)), None)


def _of(node: Node, name: str) -> Expr | None:
    found = node.tensors.get(name)
    return node.stand_in(name) if found is None else found


def _change(name: str, new: Expr, old: Expr | None, model: Node, base: Node) -> Expr | None:
    """new - old; None where the base has no such tensor, or fewer rows of it."""
    if old is None:
        return None
    if new.dtype.is_float != old.dtype.is_float:
        raise Refused(f"`{name}` is {new.dtype} in {model.label} and {old.dtype} in {base.label}")
    if new.shape != old.shape:
        if len(new.shape) == len(old.shape) == 2 and new.shape[1] == old.shape[1] and new.shape[0] > old.shape[0]:
            return None  # a vocabulary that grew
        raise Refused(
            f"`{name}` is {list(new.shape)} in {model.label} and {list(old.shape)} in {base.label}",
            hint="the base must be the model that was fine-tuned",
        )
    wide = F64 if F64 in (new.dtype, old.dtype) else F32
    return weighted([1.0, -1.0], [new, old], new.shape, wide, model)


def _factored(name: str, new: Expr, structure: Structure, only: Sequence[str]) -> bool:
    stacked = len(new.shape) == 3 and name.rpartition(".")[2] in FUSED
    possible = new.dtype.is_float and (stacked or (len(new.shape) == 2 and name.endswith(".weight")))
    if only:
        wanted = any(matches(g, name) for g in only)
        if wanted and not possible:
            raise Refused(f"`{name}` {list(new.shape)} is no linear layer or embedding: it cannot become factors")
        return wanted
    return possible and structure.block(name) is not None and (stacked or _NO_LINEAR.search(name) is None)


def _module_prefix(base: Node) -> Callable[[str], str]:
    """From a module's path on disk to that in the model with its head: GPT-2's `h.0` is `transformer.h.0` there."""
    architecture = str(((base.config or {}).get("architectures") or [""])[0])
    towers = base.structure.towers
    if not towers or towers[0].prefix.split(".")[0] not in _BARE or not _HEADED.search(architecture):
        return lambda module: module
    import transformers

    prefix = getattr(getattr(transformers, architecture, None), "base_model_prefix", "")
    if not prefix or any(n.startswith(f"{prefix}.") for n in base.tensors):
        return lambda module: module
    inside = {t.prefix.split(".")[0] for t in towers} | {n.split(".")[0] for n in base.tensors if is_token_embedding(n)}
    return lambda module: f"{prefix}.{module}" if module.split(".")[0] in inside else module
