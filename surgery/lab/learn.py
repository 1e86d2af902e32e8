"""Learning the coefficients of a merge by gradients: AdaMerging, and the learned variant of model soups.

Snapshots along the way are the trials of the sweep: evaluated on validation as recipes, like any others.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from surgery.errors import Refused
from surgery.lab.learnt import Learn
from surgery.lab.losses import drawn, examples
from surgery.lab.mixture import Mixture
from surgery.lab.resident import Resident
from surgery.lab.space import Search
from surgery.lab.trials import Trials

STATE = "learning.pt"


def coefficients(search: Search, recipe: Path, trials: Trials, resident: Resident, folder: Path) -> dict[str, Any]:
    """Learn the `weight` of the recipe's last step; a trial at every stop. What the report says of it.

    AdaMerging (Yang et al. 2024, arXiv 2310.02575): c starts at `init`, is kept within low and high, and minimises the loss
    summed over tasks, by default the entropy of the predictions. Learned soup (Wortsman et al. 2022, appendix I): c is the
    softmax over models of free numbers, and the logits are scaled by a learned number while learning.
    """
    import torch

    learn = search.learn
    assert learn is not None
    mixture = Mixture(recipe, resident, learn.per)
    if search.method == "learned_soup" and not mixture.average:
        raise Refused(f"{recipe}: a learned soup is a step `average`", hint="method: adamerging learns weights of `add`")
    by_name = {t.name: t for t in search.tasks}
    given = [examples(by_name[name], mixture.subject, learn.split) for name in learn.tasks]
    soup = search.method == "learned_soup"
    shape = mixture.count, len(mixture.groups)
    free = torch.full(shape, 0.0 if soup else learn.init, dtype=torch.float64, requires_grad=True)
    heat = torch.ones((), requires_grad=soup)
    optimizer = torch.optim.AdamW([free, heat] if soup else [free], lr=learn.lr, weight_decay=0.0)
    state = _State(folder / STATE, free, heat, optimizer)
    for stop in learn.stops:
        while state.step < stop and state.problem is None:
            step = state.step + 1
            weights = torch.softmax(free, dim=0) if soup else free
            batches = [(e, drawn(len(e), learn.batch, search.seed, step, i)) for i, e in enumerate(given)]
            optimizer.zero_grad()
            loss, gradient = mixture.gradient(weights.detach(), batches, learn.loss, heat)
            if not math.isfinite(loss) or not bool(torch.isfinite(gradient).all()):
                state.problem = f"step {step}: the loss or its gradient is not finite; the coefficients before it are kept"
                break
            weights.backward(gradient)
            optimizer.step()
            if not soup:
                with torch.no_grad():
                    free.clamp_(learn.low, learn.high)
            state.took(step, loss)
        if state.problem is not None and stop > state.step:
            state.save()
            break
        if stop not in state.stops:
            state.stops[stop] = (torch.softmax(free, dim=0) if soup else free).detach().clone()
            state.save()
        trials.evaluate(mixture.written(state.stops[stop]))
    return _told(learn, mixture, state)


class _State:
    """How far learning has come; saved at every stop, so that a killed sweep goes on from there."""

    def __init__(self, path: Path, free: Any, heat: Any, optimizer: Any) -> None:
        import torch

        self._path, self._free, self._heat, self._optimizer = path, free, heat, optimizer
        self.step, self.losses = 0, list[float]()
        self.stops: dict[int, Any] = {}
        self.problem: str | None = None
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.step, self.losses, self.stops, self.problem = (saved[k] for k in ("step", "losses", "stops", "problem"))
            optimizer.load_state_dict(saved["optimizer"])
            with torch.no_grad():
                free.copy_(saved["free"])
                heat.copy_(saved["heat"])

    def took(self, step: int, loss: float) -> None:
        self.step = step
        self.losses.append(loss)

    def save(self) -> None:
        import torch

        part = self._path.with_suffix(".partial")
        torch.save({"step": self.step, "losses": self.losses, "stops": self.stops, "problem": self.problem,
                    "free": self._free.detach(), "heat": self._heat.detach(), "optimizer": self._optimizer.state_dict()},
                   part)  # fmt: skip
        part.replace(self._path)


def _told(learn: Learn, mixture: Mixture, state: _State) -> dict[str, Any]:
    made: dict[str, Any] = {
        "loss": learn.loss, "split": learn.split, "tasks": list(learn.tasks), "per": learn.per,
        "coefficients": mixture.count * len(mixture.groups), "steps": state.step,
        "losses": [round(v, 6) for v in state.losses],
    }  # fmt: skip
    return made | ({"stopped": state.problem} if state.problem else {})
