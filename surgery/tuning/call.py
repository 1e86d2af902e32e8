"""Fine-tuning from Python: any torch module, any dataset."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from surgery.errors import Failed, Refused
from surgery.tuning.fit import Given, fit
from surgery.tuning.settings import read_settings
from surgery.tuning.trainer import Diverged, Progress


@dataclass
class Tuned:
    """What `tune` made.

    model: the one that was given, trained in place (for lora: peft's model around it). trained: names of parameters that were
    trained; entries: how many numbers that is, of `total`. masks: name -> mask of trained entries, where a method has some.
    adapted: matrices that got a low-rank change instead (spt, structured); it is inside them. rounded: what was trained through
    rounding, and is rounded now.
    history: per pass over the data `epoch`, `step`, mean `loss` and, with validation data, `validation_…`; final: the
    validation figures of the result, averages included. phases: the history of runs before the last, of methods that make any.
    """

    model: Any
    trained: list[str]
    entries: int
    total: int
    history: list[dict[str, float]]
    final: dict[str, float]
    masks: dict[str, Any]
    phases: dict[str, list[dict[str, float]]]
    adapted: list[str]
    rounded: list[str]


def tune(
    model: Any,
    dataset: Any,
    *,
    validation: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    collate: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
    metrics: Callable[[Any], Mapping[str, float]] | None = None,
    stages: Sequence[int] = (),
    calibration: Any = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Tuned:
    """Fine-tune `model` in place on `dataset`.

    settings: those of a tune file: `method="half"`, `average={"ema": {"decay": 0.99}}`, `lr=1e-3`. model: a torch module in
    float32 (transformers' included). dataset: anything with a length and items; an item is a dict of the model's arguments,
    or a pair (input, label). loss: (outputs, labels) -> scalar; needed for pairs, and for models that do not return it.
    metrics: of transformers' EvalPrediction. stages: of a stream of tasks, how many of the examples, in their order, each has:
    they are trained on one after the other, `epochs` times each. calibration: a dataset that an adapter starts from (CorDA,
    EVA); default the one it is trained on. folder: where states are saved, so that `resume` can go on from the last one;
    without it none are. progress: called with (step, steps, loss).

    Raises Refused for settings and data that cannot be used, Failed when a loss is not finite: the model then holds the
    weights from before that step.
    """
    read = read_settings(settings, lambda *path: "tune(" + ".".join(map(str, path)) + ")")
    pairs = len(dataset) > 0 and not isinstance(dataset[0], Mapping)
    if pairs and loss is None:
        raise Refused("tune: items are pairs (input, label); give a loss", hint="loss=torch.nn.functional.cross_entropy")
    wrong = [n for n, p in model.named_parameters() if p.dtype not in (torch.float32, torch.float64)]
    if wrong:
        raise Refused(f"tune: `{wrong[0]}` is {next(iter(model.parameters())).dtype}; training counts in float32",
                      hint="model.float()")  # fmt: skip
    if read.method == "lora" and "calibration" in read.options:
        raise Refused("tune(method.lora.calibration): a file belongs into a tune file", hint="tune(calibration=dataset)")
    if resume and folder is None:
        raise Refused("tune: there is nothing to resume without a folder")
    set_seed(read.seed)  # peft draws factors from torch's own generator, which is as whoever used it last left it
    own = not isinstance(model, PreTrainedModel)
    if read.regularise.get("label_smoothing") and (own or loss is not None):
        raise Refused("tune: label_smoothing belongs into the loss", hint="CrossEntropyLoss(label_smoothing=…)")
    around = (lambda inner: Supervised(inner, loss)) if own or loss is not None else None
    given = Given(model, dataset, validation, collate or (stacked_pairs if pairs else None), metrics, around=around,
                  stages=stages, calibration=calibration)  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        try:
            made = fit(given, read, Path(folder or scratch), save=folder is not None, resume=resume, progress=progress)
        except Diverged as problem:
            raise Failed(f"tune: stopped: {problem}; the model holds the weights from before it",
                         hint="a lower lr, or warmup") from None  # fmt: skip
    return Tuned(made.model, made.trained, made.entries, made.total, made.history, made.final, made.masks,
                 made.phases, made.adapted, made.rounded)  # fmt: skip


class Supervised(torch.nn.Module):
    """A module, and its loss unless it returns one, called as the Trainer calls models."""

    accepts_loss_kwargs = False  # the Trainer would guess so from **named, and not divide by the number of batches

    def __init__(self, module: Any, loss: Callable[[Any, Any], Any] | None) -> None:
        super().__init__()
        self.module = module
        self._loss = loss

    def forward(self, **named: Any) -> Any:
        if self._loss is None:
            return self.module(**named)
        labels = named.pop("labels")
        made = self.module(named["inputs"]) if set(named) == {"inputs"} else self.module(**named)
        return {"loss": self._loss(made, labels).clone(), "logits": made}  # the Trainer scales the loss in place

    def get_input_embeddings(self) -> Any:
        return self.module.get_input_embeddings()


def stacked_pairs(items: Sequence[Any]) -> dict[str, Any]:
    """Pairs (input, label) as tensors `inputs` and `labels`."""
    inputs = torch.stack([torch.as_tensor(x) for x, _ in items])
    return {"inputs": inputs, "labels": torch.stack([torch.as_tensor(y) for _, y in items])}
