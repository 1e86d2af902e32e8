"""A training run from settings: what is trained, with what around it, in one or two phases; and what came out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from surgery.errors import Refused
from surgery.tuning import methods
from surgery.tuning.averages import KINDS
from surgery.tuning.forward import FastForward
from surgery.tuning.gates import Gates
from surgery.tuning.masks import Masks
from surgery.tuning.parts import Parts
from surgery.tuning.regularise import LowRank, Mixout, Pull
from surgery.tuning.rows import Stream
from surgery.tuning.settings import Settings
from surgery.tuning.structured import Adapters, split
from surgery.tuning.tasks import quiet
from surgery.tuning.trainer import WHOLE, Progress, Tuner, last_whole, measured


@dataclass
class Fitted:
    """model: trained, in place (with an adapter around it for lora). trained: names of parameters that were; entries: how many
    numbers that is, of `total`. history: one dict per pass over the data; phases: the same of phases before the last."""

    model: Any
    trained: list[str]
    entries: int
    total: int
    history: list[dict[str, float]]
    phases: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)  # matrices with a low-rank change


@dataclass
class Given:
    """The model and data of a run. around: makes of the model what the Trainer calls, which returns a loss."""

    model: Any
    train: Any
    validation: Any
    collate: Any
    metrics: Any = None
    new: Collection[str] = ()
    kind: str | None = None  # peft's word for the task
    around: Callable[[Any], Any] | None = None
    stages: Sequence[int] = ()  # of a stream of tasks: how many of the training examples each has

    @property
    def run(self) -> Any:
        return self.model if self.around is None else self.around(self.model)


def fit(given: Given, settings: Settings, folder: Path, *, save: bool, resume: bool, progress: Progress | None) -> Fitted:
    """Train. folder: for saved states. Raises Refused before the first step, Diverged after a loss that is not finite."""
    if len(given.train) == 0:
        raise Refused("there are no examples to train on")
    if settings.method == "lora":
        given.model = methods.adapted(given.model, settings.options, given.kind)
    if settings.regularise.get("neftune") and not hasattr(given.model, "get_input_embeddings"):
        raise Refused(f"regularise.neftune: {type(given.model).__name__} has no token embeddings")
    parts = Parts(given.model, given.new)
    if settings.method != "lora":
        trained = methods.trained_by(parts, settings)
        for name, p in parts.parameters.items():
            p.requires_grad_(name in trained)
    names = [n for n, p in parts.parameters.items() if p.requires_grad]
    if not names:
        raise Refused(f"method: {settings.method}: the model has nothing of that kind to train")
    with quiet():
        masks: dict[str, Any] | None = None
        phases = {}
        if settings.method == "lt_sft":
            masks, phases["choosing"] = _far(given, parts, settings, folder, save=save, resume=resume, progress=progress)
        elif settings.method == "diff_pruning":
            masks, phases["gating"] = _gated(given, parts, settings, folder, save=save, resume=resume, progress=progress)
        tuner = _tuner(given, parts, settings, folder, save=save, progress=progress)
        at = last_whole(folder) if resume else None
        if settings.method == "spt" and settings.options.get("structured"):
            masks = _structured(tuner, folder, save=save, resume=resume)
        try:
            _equip(tuner, given, settings, masks, resumed=at is not None)
            set_seed(settings.seed)
            tuner.train(resume_from_checkpoint=at)
            changed = tuner.average is not None and tuner.average.finish()
            if tuner.adapters is not None:
                tuner.adapters.fold()
            if changed:
                _renew_batch_norms(tuner)
            final = {}
            if given.validation is not None:
                history = [dict(h) for h in tuner.history]
                final = measured(tuner.evaluate())
                tuner.history = history
        finally:
            if tuner.adapters is not None:
                tuner.adapters.release()
    kept, adapted = tuner.masks, tuner.adapters.names if tuner.adapters is not None else []
    whole = set(names) - {*(kept.names if kept is not None else ()), *adapted}
    entries = sum(parts.parameters[n].numel() for n in whole) + (kept.entries() if kept is not None else 0)
    entries += len(tuner.adapters) if tuner.adapters is not None else 0
    return Fitted(
        given.model, names, entries, sum(p.numel() for p in parts.parameters.values()), tuner.history, phases, final,
        kept.state() if kept is not None else {}, adapted,
    )  # fmt: skip


def _structured(tuner: Tuner, folder: Path, *, save: bool, resume: bool) -> dict[str, Any]:
    """SPT with its structured part: adapters for some matrices, and masks of all else. The choice is kept for a resumed run."""
    chosen, parts, options = folder / "chosen.pt", tuner.parts, tuner.settings.options
    more, names = options["structured"], parts.matrices | parts.vectors
    if resume and chosen.exists():
        masks: dict[str, Any] = torch.load(chosen, weights_only=True)
    else:
        masks = methods.sensitive(parts, names, lambda: _gradients(tuner, options["batches"]), options["density"])
        if save:
            torch.save(masks, chosen.with_suffix(".partial"))
            chosen.with_suffix(".partial").replace(chosen)
    kept, adapted = split(masks, list(parts.matrices), rank=more["rank"], alpha=more["alpha"], beta=more["beta"])
    if adapted:
        tuner.adapters = Adapters(parts, adapted, rank=more["rank"], scale=more["scale"], seed=tuner.settings.seed)
    return kept


def _tuner(given: Given, parts: Parts, settings: Settings, folder: Path, *, save: bool, progress: Progress | None) -> Tuner:
    runs = settings.average_options["runs"] if settings.average == "stock" else 1
    passes, train = settings.epochs * runs, given.train
    if given.stages:
        if settings.average == "stock" or settings.epochs != int(settings.epochs):
            raise Refused("a stream of tasks needs whole epochs, and no stock, which merges after each of them")
        passes, train = 1, Stream(train, given.stages, int(settings.epochs), settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for broken in folder.glob("checkpoint-*"):
        if not (broken / WHOLE).exists():
            shutil.rmtree(broken)
    return Tuner(
        given.run, parts, settings, passes=passes, folder=folder, save=save, progress=progress, train_dataset=train,
        eval_dataset=given.validation, data_collator=given.collate, compute_metrics=given.metrics,
    )  # fmt: skip


def _equip(tuner: Tuner, given: Given, settings: Settings, masks: dict[str, Any] | None, *, resumed: bool) -> None:
    """Everything around the updates. The model has its base values, and is on its device."""
    parts, extra = tuner.parts, settings.regularise
    old = {n: p for n, p in parts.parameters.items() if p.requires_grad and n not in parts.new}
    if extra.get("l2_sp"):
        tuner.pulls.append(Pull(old, extra["l2_sp"]))
    if extra.get("mixout"):
        tuner.mixout = Mixout(parts.model, old, extra["mixout"])
        if not len(tuner.mixout):
            raise Refused("regularise.mixout: no linear or convolution layer that came with the base is trained")
    if settings.average is not None:
        tuner.average = KINDS[settings.average](tuner.trained, **settings.average_options)
    if settings.method in ("lt_sft", "lift", "random", "sara", "spt", "diff_pruning"):
        tuner.masks = Masks(parts.parameters)
        if settings.method == "lift":
            tuner.renew = methods.Principal(parts, tuner.masks, settings.options)
        elif settings.method == "random":
            seed = settings.options.get("seed")
            masks = methods.drawn(parts, settings.options["density"], settings.seed if seed is None else seed)
        elif settings.method == "sara":
            masks = methods.small(parts, settings.options["threshold"])
            if settings.options.get("narrow"):
                tuner.renew = methods.Narrowed(parts, tuner.masks, settings.options, lambda: tuner.state.max_steps)
            if settings.options["nuclear"]:
                matrices = {n: parts.parameters[n] for n in sorted(parts.matrices)}
                tuner.pulls.append(LowRank(matrices, settings.options["nuclear"], settings.seed))
        elif settings.method == "spt" and masks is None and not resumed:
            batches, density = settings.options["batches"], settings.options["density"]
            masks = methods.sensitive(parts, parts.matrices, lambda: _gradients(tuner, batches), density)
        for name, mask in (masks or {}).items():
            tuner.masks.set(name, mask)
    if settings.fast_forward is not None:
        if given.validation is None:
            raise Refused("fast_forward: looks at validation examples, and there are none", hint="task.validation: FILE")
        tuner.forward_again = FastForward(tuner, **settings.fast_forward)


def _gradients(tuner: Tuner, batches: int) -> Iterator[None]:
    """One batch after the other, its gradient left in the parameters."""
    set_seed(tuner.settings.seed)
    model: Any = tuner.model
    model.train()
    for i, inputs in enumerate(tuner.get_train_dataloader()):
        if i == batches:
            break
        model.zero_grad()
        loss: Any = tuner.compute_loss(model, tuner._prepare_inputs(inputs))
        loss.backward()
        yield
    model.zero_grad()


def _far(
    given: Given, parts: Parts, settings: Settings, folder: Path, *, save: bool, resume: bool, progress: Progress | None
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The first phase of LT-SFT: a full run that chooses entries; then everything is as before it."""
    chosen = folder / "chosen.pt"
    if resume and chosen.exists():
        saved = torch.load(chosen, weights_only=True)
        return saved["masks"], saved["history"]
    start = {n: p.detach().clone() for n, p in parts.parameters.items()}
    buffers = {n: b.detach().clone() for n, b in parts.model.named_buffers()}
    epochs = settings.options.get("epochs") or settings.epochs
    first = replace(settings, method="full", options=None, average=None, average_options={}, fast_forward=None,
                    epochs=epochs)  # fmt: skip
    tuner = _tuner(given, parts, first, folder / "choosing", save=save, progress=progress)
    at = last_whole(folder / "choosing") if resume else None
    _equip(tuner, given, first, None, resumed=at is not None)
    set_seed(settings.seed)
    tuner.train(resume_from_checkpoint=at)
    start = {n: v.to(parts.parameters[n].device) for n, v in start.items()}
    masks = methods.far(parts, tuner.trained, start, settings.options["density"])
    with torch.no_grad():
        for name, p in parts.parameters.items():
            p.copy_(start[name])
        for name, b in parts.model.named_buffers():
            b.copy_(buffers[name])
    parts.model.zero_grad()
    if save:
        torch.save({"masks": masks, "history": tuner.history}, chosen.with_suffix(".partial"))
        chosen.with_suffix(".partial").replace(chosen)
    return masks, tuner.history


def _gated(
    given: Given, parts: Parts, settings: Settings, folder: Path, *, save: bool, resume: bool, progress: Progress | None
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The first phase of diff pruning: a full run under gates. What they leave is projected to `density`; the second phase
    goes on from there with the mask fixed. The head is trained without gates, and stays as it came out."""
    chosen, options = folder / "chosen.pt", settings.options
    start = {n: p.detach().clone() for n, p in parts.parameters.items()}
    if resume and chosen.exists():
        saved = torch.load(chosen, weights_only=True)
    else:
        epochs = options.get("epochs") or settings.epochs
        first = replace(settings, method="full", options=None, average=None, average_options={}, fast_forward=None,
                        epochs=epochs)  # fmt: skip
        tuner = _tuner(given, parts, first, folder / "gating", save=save, progress=progress)
        at = last_whole(folder / "gating") if resume else None
        _equip(tuner, given, first, None, resumed=at is not None)
        inside = {n: p for n, p in tuner.trained.items() if n not in parts.head}
        tuner.gates = Gates(parts.model, inside, penalty=options["penalty"], lr=options["gate_lr"], groups=options["groups"])
        set_seed(settings.seed)
        tuner.train(resume_from_checkpoint=at)
        changes = tuner.gates.changes()
        masks = methods.left(parts, changes, options["density"])
        values = {n: parts.parameters[n].detach().clone() for n in tuner.trained if n in parts.head}
        for n, c in changes.items():
            values[n] = torch.where(masks[n].to(c.device), start[n].to(c.device) + c, start[n].to(c.device))
        history = [dict(h) for h in tuner.history]
        if history:
            history[-1]["open"] = tuner.gates.expected()
        saved = {"masks": masks, "history": history, "values": values}
        if save:
            torch.save(saved, chosen.with_suffix(".partial"))
            chosen.with_suffix(".partial").replace(chosen)
    with torch.no_grad():
        for name, value in saved["values"].items():
            parts.parameters[name].copy_(value)
    parts.model.zero_grad()
    return saved["masks"], saved["history"]


def _renew_batch_norms(tuner: Tuner) -> None:
    """Running statistics of batch norms belong to the weights before averaging: measured anew in one pass over the data."""
    model: Any = tuner.model
    kind = torch.nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.track_running_stats]
    if not norms:
        return
    was = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean over batches
    model.train()
    with torch.no_grad():
        for inputs in tuner.get_train_dataloader():
            tuner.compute_loss(model, tuner._prepare_inputs(inputs))
    for m, momentum in zip(norms, was, strict=True):
        m.momentum = momentum
