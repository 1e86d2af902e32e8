"""Gradient sensitivity: how much a task's loss would change with each weight (SPT, He et al. 2023, arXiv 2303.08566, eq. 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.statistics.live import Live


def collect_sensitivity(
    live: Live, texts: Sequence[Sequence[int]], labels: Sequence[int] | None, batch: int, progress: Callable[[], None]
) -> tuple[dict[str, Any], int]:
    """(name -> sum over batches of the squared gradient of the batch's mean loss, float32; batches).

    Causal language models: the loss of a text is its mean negative log-likelihood per token. Classifiers: that of its label.
    Texts run one by one, unpadded; `batch` of them make a gradient.
    """
    import torch

    if live.head == "other":
        raise Refused(
            f"{type(live.model).__name__}: sensitivity needs a causal language model or a sequence classifier",
            hint="--kind gram works for any model that takes token ids",
        )
    parameters = {live.names[id(p)]: p for p in live.model.parameters() if id(p) in live.names}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    used = [i for i, ids in enumerate(texts) if live.head == "classes" or len(ids) > 1]
    if not used:
        raise Refused("no text has two tokens: there is nothing to predict")
    batches = [used[a : a + batch] for a in range(0, len(used), batch)]
    for rows in batches:
        live.model.zero_grad(set_to_none=True)
        for i in rows:
            logits = live.run(texts[i]).logits[0].float()
            if labels is not None:
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[i]))
            else:
                loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(list(texts[i])[1:]))
            (loss / len(rows)).backward()
            progress()
        for name, p in parameters.items():
            if p.grad is not None:
                sums[name].addcmul_(p.grad, p.grad)
    live.model.zero_grad(set_to_none=True)
    return sums, len(batches)


def labels_of(path: Path, live: Live, count: int) -> list[int]:
    """The `label` (a name or number that the model knows) of every line with a text, for a classifier. Raises Refused."""
    names = {str(v): int(k) for k, v in (getattr(live.model.config, "id2label", None) or {}).items()}
    if path.suffix != ".jsonl":
        raise Refused(f"{path}: sensitivity of a classifier needs labels", hint='a .jsonl file: {"text": "…", "label": "…"}')
    made: list[int] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip() or len(made) == count:
            continue
        said = json.loads(line).get("label")
        found = names.get(str(said), said if isinstance(said, int) and 0 <= said < len(names) else None)
        if found is None or isinstance(said, bool):
            raise Refused(f"{path}:{number}: the model knows no label {said!r}", hint=did_you_mean(str(said), names))
        made.append(found)
    if len(made) != count:
        raise Refused(f"{path}: {len(made)} labels for {count} texts", hint="a text of no tokens cannot have one")
    return made
