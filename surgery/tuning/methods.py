"""Which parameters a method trains, and which of their entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from surgery.errors import Refused, did_you_mean
from surgery.ops.random import bits32
from surgery.tuning import starts
from surgery.tuning.half import chosen_half
from surgery.tuning.masks import Masks, entries_of, largest, principal
from surgery.tuning.parts import Parts
from surgery.tuning.settings import Settings


def trained_by(parts: Parts, settings: Settings) -> set[str]:
    """Names of the parameters that a method trains, whole or in part. Raises Refused where the model has none such."""
    names, k = set(parts.parameters), settings.options
    if settings.method in ("last", "frozen"):
        if k > parts.depth:
            raise Refused(f"method.{settings.method}: {k} blocks, but the model has {parts.depth}")
        low = parts.depth - k if settings.method == "last" else k
        return {n for n in names if parts.height(n) > low}
    if settings.method == "head":
        if not parts.head:
            raise Refused("method: head: the model has none, or it is the embeddings' own matrix",
                          hint="method: {last: 1} trains a block")  # fmt: skip
        return set(parts.head)
    if settings.method == "bitfit":
        found = {n for n in names if n.rpartition(".")[2].startswith("bias") or n.endswith("_bias")}
        if not found:
            raise Refused("method: bitfit: the model has no biases", hint="Llama and its kin have none; try `last` or `lora`")
        return found | parts.new
    if settings.method == "half":
        seed = settings.options.get("seed")
        return names - chosen_half(parts, settings.seed if seed is None else seed)
    if settings.method == "lt_sft":
        return names if settings.options["norms"] else {n for n in names if n in parts.head or not is_norm(n, parts)}
    if settings.method == "diff_pruning":
        return names
    if settings.method in ("lift", "random", "sara", "spt", "columns"):
        if not parts.matrices:
            raise Refused(f"method: {settings.method}: the model has no matrices outside head and embeddings")
        structured = settings.method == "spt" and settings.options.get("structured")
        return set(parts.matrices | parts.new | (parts.vectors if structured else frozenset()))
    return names


def is_norm(name: str, parts: Parts) -> bool:
    """True for scales and shifts of normalisation layers: vectors of a module without a matrix, biases of others are none."""
    layer = name.rpartition(".")[0]
    return all(p.ndim < 2 for n, p in parts.parameters.items() if n.rpartition(".")[0] == layer)


def far(parts: Parts, trained: Iterable[str], start: Mapping[str, Any], density: float) -> dict[str, Any]:
    """LT-SFT (Ansell et al. 2022, arXiv 2110.07560): the entries that a full run moved furthest from `start`, over all
    tensors but the head."""
    moved = {n: (parts.parameters[n].detach() - start[n]).abs() for n in sorted(trained) if n not in parts.head}
    if not moved:
        raise Refused("method: lt_sft: the model has no parameters outside its head")
    return largest(moved, max(1, round(density * sum(v.numel() for v in moved.values()))))


def left(parts: Parts, changes: Mapping[str, Any], density: float) -> dict[str, Any]:
    """Diff pruning: the entries with the largest change that gates have left, over all tensors but the head."""
    if not changes:
        raise Refused("method: diff_pruning: the model has no parameters outside its head")
    sizes = {n: torch.where(changes[n] == 0, -1.0, changes[n].abs()) for n in sorted(changes)}  # what is closed stays so
    return largest(sizes, max(1, round(density * sum(v.numel() for v in sizes.values()))))


def small(parts: Parts, threshold: float) -> dict[str, Any]:
    """SaRA (Hu et al. 2024, arXiv 2409.06633): the entries of matrices below a threshold."""
    masks = {n: parts.parameters[n].detach().abs() < threshold for n in sorted(parts.matrices)}
    if not any(bool(m.any()) for m in masks.values()):
        raise Refused(f"method.sara.threshold: no entry is smaller than {threshold}")
    return masks


def drawn(parts: Parts, density: float, seed: int) -> dict[str, Any]:
    """In every matrix as many entries as `lift` trains at this density, drawn by seed and name alone: what a choice of
    entries must beat (Xu and Zhang 2024, Random masking finds winning tickets, arXiv 2405.02596)."""
    made = {}
    for name in sorted(parts.matrices):
        p = parts.parameters[name]
        numbers = torch.from_numpy(bits32(seed, name, 0, p.numel()).astype("float64")).reshape(p.shape)
        made[name] = largest({name: numbers}, entries_of(p.shape, density=density, budget=None))[name].to(p.device)
    return made


class Narrowed:
    """SaRA's progressive part: once a share of the run is done, entries that have outgrown the threshold are frozen where they
    are; those still below it are trained on."""

    def __init__(self, parts: Parts, masks: Masks, options: Mapping[str, Any], total: Callable[[], int]) -> None:
        self._parts, self._masks, self._options, self._total = parts, masks, options, total

    def on_step_begin(self, step: int, optimizer: Any) -> None:
        """step: updates done so far."""
        if step == 0 or step != round(self._options["narrow"] * self._total()):
            return
        for name in sorted(self._parts.matrices):
            mask = self._masks.get(name)
            self._masks.set(name, mask & (self._parts.parameters[name].detach().abs() < self._options["threshold"]))


def sensitive(parts: Parts, names: Iterable[str], gradients: Callable[[], Iterable[None]], density: float) -> dict[str, Any]:
    """SPT (He et al. 2023, arXiv 2303.08566): of the tensors `names` the entries with the largest sum over batches of squared
    gradients. gradients: an iterable that leaves one batch's gradient in the parameters at each step."""
    names = sorted(names)
    scores = {n: torch.zeros_like(parts.parameters[n]) for n in names}
    for _ in gradients():
        for n in names:
            grad = parts.parameters[n].grad
            if grad is not None:
                scores[n].addcmul_(grad, grad)
    return largest(scores, max(1, round(density * sum(v.numel() for v in scores.values()))))


class Principal:
    """LIFT (Liu et al. 2025, arXiv 2506.00772): in every matrix the largest entries of its low-rank approximation.

    The choice is renewed every `every` steps. Moments of the optimizer stay where an entry was trained before and still is, and
    are zero elsewhere. The published code takes the smallest entries by mistake; this takes the largest, as the paper says.
    """

    def __init__(self, parts: Parts, masks: Masks, options: Mapping[str, Any]) -> None:
        self._parts, self._masks, self._options = parts, masks, options

    def on_step_begin(self, step: int, optimizer: Any) -> None:
        """step: updates done so far."""
        if step % self._options["every"]:
            return
        for name in sorted(self._parts.matrices):
            p = self._parts.parameters[name]
            count = entries_of(p.shape, density=self._options["density"], budget=self._options.get("budget"))
            before, mask = self._masks.get(name), principal(p, self._options["rank"], count)
            self._masks.set(name, mask)
            for moment in optimizer.state.get(p, {}).values():
                if before is not None and torch.is_tensor(moment) and moment.shape == p.shape:
                    moment.masked_fill_(~(mask & before), 0.0)


def adapted(model: Any, options: Mapping[str, Any], kind: str | None, batches: Callable[[], starts.Batches]) -> Any:
    """The model with a fresh adapter of peft's, its own parameters frozen. kind: "SEQ_CLS", "CAUSAL_LM" or None. batches: what
    a start from data is made of."""
    try:
        import peft
    except ImportError:
        raise Refused("method: lora needs peft", hint='pip install "weight-surgery[tune]"') from None
    options = starts.checked(dict(options))
    name = str(options.pop("peft_type", "LORA")).upper()
    known = {str(getattr(k, "value", k)): v for k, v in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in known:
        raise Refused(f"method.lora.peft_type: peft has no `{name}`", hint=did_you_mean(name, known))
    import inspect

    takes = inspect.signature(known[name]).parameters
    for key in options:
        if key not in takes:
            raise Refused(f"method.lora: {known[name].__name__} has no `{key}`", hint=did_you_mean(key, takes))
    try:
        config: Any = known[name]
        made = config(**({"task_type": kind} if kind else {}), **options)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what peft calls there
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage")
        start = starts.kind(options)
        if start == "corda":
            made = starts.prepared(model, made, batches())
        model = peft.get_peft_model(model, made)
        if start == "eva":
            starts.explained(model, batches())
        return model
    except (ValueError, TypeError, KeyError) as problem:
        raise Refused(f"method.lora: {(str(problem).splitlines() or [''])[0]}") from None
