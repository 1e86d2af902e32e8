"""Base and fine-tune alive together, one of which speaks at every prediction: collaborative decoding.

The gate is learned on validation splits, read from a file, or an oracle that looks at the right answers. The oracle is an upper
bound that no gate reaches, and for measuring alone: of accuracy where tasks have labels, of likelihood on texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from surgery.errors import Refused
from surgery.lab.choice import Choice
from surgery.lab.classify import Classification
from surgery.lab.combine import COLLABORATIVE
from surgery.lab.fused_module import Together, output
from surgery.lab.gate import Gate, fit, said_by
from surgery.lab.losses import Examples, drawn, examples
from surgery.lab.outcome import Array, Labelled, Language, Outcome, log_softmax
from surgery.lab.subject import Subject
from surgery.lab.tasks import Task

_LOGITS = 256 << 20  # bytes of predictions held at a time while fitting


class Gated(Together):
    """gate: a `Gate`, or "oracle", or "learned" until it is fitted. shows: what a forward pass gives: "gated"; "tuned" or
    "base" alone; "parts", all that a gate is fitted on side by side; or "answers", the better one given the next tokens."""

    def __init__(self, name: str, tuned: Subject, base: Subject, options: Mapping[str, Any]) -> None:
        super().__init__(COLLABORATIVE, {"tuned": [tuned], "base": [base]}, {})
        self.name, self.gate, self.shows = name, options["gate"], "gated"
        self.features = self.gate.features if isinstance(self.gate, Gate) else options["features"]
        self.looks_at_labels = self.gate == "oracle"
        self._seen: Any = None
        self.eval()

    @contextmanager
    def showing(self, what: str) -> Iterator[None]:
        before, self.shows = self.shows, what
        try:
            yield
        finally:
            self.shows = before

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Normalised log-probabilities, float32, of the model that speaks."""
        with self._watched():
            tuned, base = self.predictions(args, inputs)
        if self.shows in ("tuned", "base"):
            made = tuned if self.shows == "tuned" else base
        elif self.shows == "parts":
            made = torch.cat([tuned, base, self._described(tuned, base)], dim=-1)
        elif self.shows == "answers":
            made = _better(tuned, base, inputs["input_ids"])
        elif isinstance(self.gate, Gate):
            x = self._described(tuned, base)
            if x.shape[-1] != len(self.gate.weights):
                raise Refused(
                    f"{self.name}: its gate looks at {len(self.gate.weights)} numbers, these models give {x.shape[-1]}",
                    hint="the gate was fitted with other models",
                )
            made = torch.where(self.gate.tuned(x)[..., None], tuned, base)
        else:
            raise Refused(
                f"{self.name}: an oracle looks at the right answers: it is measured by itself, on tasks that know them",
                hint="gate: learned",
            )
        return output(made, args, inputs)

    def _described(self, tuned: Any, base: Any) -> Any:
        parts = [] if self.features == "hidden" else [said_by(tuned, base)]
        if self.features != "predictions":
            parts.append(self._hidden(tuned))
        return torch.cat(parts, dim=-1)

    def _hidden(self, like: Any) -> Any:
        seen = self._seen
        if seen is None or seen.shape[:-1] != like.shape[:-1]:
            found = "is not to be found" if seen is None else f"sees {list(seen.shape)} for predictions {list(like.shape)}"
            raise Refused(
                f"{self.subjects[1].name}: the base's output layer {found}: no hidden states", hint="features: predictions"
            )
        return seen.float()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Keep what the base's output layer is given: its last hidden state."""
        self._seen = None
        if self.features == "predictions":
            yield
            return

        def keep(layer: Any, given: tuple[Any, ...]) -> None:
            self._seen = given[0]  # of the last linear layer that runs

        layers = [m for m in self.subjects[1].module.modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_pre_hook(keep) for m in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _better(tuned: Any, base: Any, ids: Any) -> Any:
    """At every position what gives the next token more probability; the last one, which has none, is the tuned model's."""
    wanted = ids[:, 1:, None].to(tuned.device)
    ahead = tuned[:, :-1].gather(-1, wanted) >= base[:, :-1].gather(-1, wanted)
    return torch.cat([torch.where(ahead, tuned[:, :-1], base[:, :-1]), tuned[:, -1:]], dim=1)


def run_oracle(task: Task, subject: Subject, split: str) -> Outcome:
    """A task under a gate that knows the right answers. Labels: of a model that is right and one that is wrong the right one,
    else the one that gives the label more probability. Raises Refused for tasks that do not tell their answers."""
    gated: Gated = subject.module
    if task.OUTCOME is Language:
        with gated.showing("answers"):
            return task.run(subject, split)
    if task.OUTCOME is not Labelled:
        raise task.refuse("its right answers are unknown here: an oracle gate cannot choose", hint="gate: learned, or a file")
    found: list[Labelled] = []
    for member in ("tuned", "base"):
        with gated.showing(member):
            outcome = task.run(subject, split)
        assert isinstance(outcome, Labelled)
        found.append(outcome)
    tuned, base = found
    rows = np.arange(len(tuned.labels))
    worth = [
        (o.scores.argmax(axis=1) == o.labels) + np.exp(log_softmax(o.scores)[rows, o.labels]) / 2 for o in (tuned, base)
    ]  # fmt: skip
    return replace(tuned, scores=np.where((worth[0] >= worth[1])[:, None], tuned.scores, base.scores))


class _Options(Examples):
    """The right option of every multiple-choice question, token by token."""

    def __init__(self, task: Choice, subject: Subject, split: str) -> None:
        super().__init__(task, subject, split)
        self._ids, self._skipped = task.right_options(subject, split)

    def __len__(self) -> int:
        return len(self._ids)

    def logits(self, rows: Sequence[int]) -> tuple[Any, Any]:
        from surgery.lab.batches import padded

        ids = [self._ids[i] for i in rows]
        made = self.subject.run(**padded(self.subject, [{"input_ids": x, "attention_mask": [1] * len(x)} for x in ids])).logits
        kept = [r[self._skipped[i] - 1 : len(x) - 1] for i, x, r in zip(rows, ids, made, strict=True)]
        return torch.cat(kept), torch.tensor([t for i, x in zip(rows, ids, strict=True) for t in x[self._skipped[i] :]])


def fitted(subject: Subject, tasks: Sequence[Task], options: Mapping[str, Any]) -> Gate:
    """The gate of a `Gated` subject, learned on the validation splits of tasks as they are (not of their shifts).

    A prediction's worth is the difference in log-likelihood of the right token on texts, in probability of the right label
    elsewhere; tasks weigh the same, whatever their number of predictions. At most `examples` of a task are used, drawn by
    `seed`. Raises Refused where there is nothing to fit on.
    """
    gated: Gated = subject.module
    usable = [t for t in tasks if t.family == t.name and "validation" in t.splits and t.OUTCOME in (Labelled, Language)]
    if not usable:
        raise Refused(
            f"{gated.name}: a learned gate is fitted on validation splits, and no task here has one",
            hint="validation: FILE in the tasks, or gate: FILE of one that was fitted before (--keep-gate)",
        )
    features: list[Array] = []
    gains: list[Array] = []
    shares: list[Array] = []
    for task in usable:
        x, gain = _collected(task, subject, gated, int(options["examples"]), int(options["seed"]))
        if not (np.isfinite(x).all() and np.isfinite(gain).all()):
            raise task.refuse(f"{gated.name}: predictions on the validation split are not finite: no gate can be fitted")
        features.append(x)
        gains.append(gain)
        shares.append(np.full(len(gain), 1.0 / len(gain)))
    report = {
        "tasks": {t.name: len(g) for t, g in zip(usable, gains, strict=True)},
        "models": {"tuned": gated.subjects[0].name, "base": gated.subjects[1].name},
        "penalty": options["penalty"],
        **{k: int(options[k]) for k in ("examples", "seed")},
    }
    x, gain, share = (np.concatenate(parts) for parts in (features, gains, shares))
    return fit(gated.features, x, gain, share, float(options["penalty"]), report)


def _collected(task: Task, subject: Subject, gated: Gated, most: int, seed: int) -> tuple[Array, Array]:
    """Features (n, k) and what the tuned model is better by (n,), of one task's validation examples."""
    if isinstance(task, Classification) and "head" in task.said:
        raise task.refuse(f"{subject.name} puts predictions together; a `head` takes the hidden states of one model")
    found = _Options(task, subject, "validation") if isinstance(task, Choice) else examples(task, subject, "validation")
    texts = task.OUTCOME is Language or isinstance(task, Choice)
    rows = drawn(len(found), most, seed)
    size = max(1, min(64, _LOGITS // (8 * task.said.get("length", 512) * (subject.rows or 1000))))
    features, gains = [], []
    with torch.inference_mode(), gated.showing("parts"):
        for a in range(0, len(rows), size):
            parts, labels = found.logits(rows[a : a + size])
            classes = gated.classes
            if int(labels.max()) >= classes:
                raise task.refuse(f"label {int(labels.max())}: the models know {classes} classes, 0 to {classes - 1}")
            wanted = labels.to(parts.device)[:, None]
            ours, theirs = (parts[:, i : i + classes].gather(1, wanted)[:, 0].double() for i in (0, classes))
            gains.append((ours - theirs if texts else ours.exp() - theirs.exp()).cpu().numpy())
            features.append(parts[:, 2 * classes :].double().cpu().numpy())
    return np.concatenate(features), np.concatenate(gains)
